"""The C code that is compiled into every artifact, and `llmc.h`, with which C programs use one."""

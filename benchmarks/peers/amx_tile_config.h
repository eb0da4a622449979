/* For building llama.cpp for a CPU with AMX by GCC 12 and older: pass it with CXXFLAGS="-include THIS_FILE".
 *
 * Their _tile_loadconfig() tells the optimizer that 8 of the 64 bytes are read, so it may drop what was stored to the
 * others, and the instruction faults on a tile configuration that nobody wrote. This one names all 64. */
#ifndef LLMC_PEERS_AMX_TILE_CONFIG_H
#define LLMC_PEERS_AMX_TILE_CONFIG_H
#if defined(__AMX_TILE__) && defined(__GNUC__) && !defined(__clang__)
#include <immintrin.h>
#define _tile_loadconfig(config) __asm__ volatile("ldtilecfg %0" : : "m"(*(const char(*)[64])(config)))
#endif
#endif

/* What this artifact is: generated beside its step (targets/facts.py). */
#ifndef LLMC_FACTS_H
#define LLMC_FACTS_H

#include "llmc.h"

extern const LlmcFacts llmc_facts;

#endif

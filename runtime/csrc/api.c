/* The table of llmc.h. */
#include <stddef.h>

#include "model.h"

const LlmcApi *llmc_api(int64_t version) {
    static const LlmcApi table = {
        .bytes = sizeof table,
        .facts = &llmc_facts,
        .error = llmc_error,
        .open = llmc_open,
        .close = llmc_close,
        .sequence = llmc_sequence,
        .fork = llmc_fork,
        .end = llmc_end,
        .length = llmc_length,
        .feed = llmc_feed,
        .feed_all = llmc_feed_all,
        .rollback = llmc_rollback,
        .next = llmc_next,
        .logits = llmc_logits,
        .encode = llmc_encode,
        .adopt = llmc_adopt,
        .load_adapter = llmc_load_adapter,
        .unload_adapter = llmc_unload_adapter,
        .adapt = llmc_adapt,
    };
    return version == LLMC_API_VERSION ? &table : NULL;
}

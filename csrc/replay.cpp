// Makes calls of this library that were written down before, one after the other. Between two of them there is no Python.
#include "quire.h"

#include <cstring>
#include <type_traits>
#include <utility>

namespace {

template <class T> T argument(int64_t word) {
    if constexpr (std::is_pointer_v<T>) {
        return reinterpret_cast<T>(word);
    } else if constexpr (std::is_same_v<T, float>) {
        float value;
        std::memcpy(&value, &word, sizeof value);
        return value;
    } else {
        return T(word);
    }
}

template <auto function> struct Call;
template <class... A, int (*function)(A...)> struct Call<function> {
    static_assert(sizeof...(A) <= QUIRE_MOST_ARGUMENTS);
    template <size_t... I> static int make(const int64_t *words, std::index_sequence<I...>) {
        return function(argument<A>(words[I])...);
    }
    static int make(const int64_t *words) { return make(words, std::index_sequence_for<A...>{}); }
};

struct Known {
    const char *name;
    int (*make)(const int64_t *);
};

#define KNOWN(name) {#name, Call<quire_##name>::make}
constexpr Known known[] = {
    KNOWN(linear),     KNOWN(linears),    KNOWN(weight_rows), KNOWN(rms_norm), KNOWN(layer_norm),     KNOWN(activation),
    KNOWN(add),        KNOWN(gather_rows), KNOWN(rope),       KNOWN(write_kv), KNOWN(rope_and_write), KNOWN(attend),
    KNOWN(lora),       KNOWN(loras),
};

}  // namespace

#pragma GCC visibility push(default)
extern "C" {

int quire_function(const char *name) {
    for (const Known &one : known)
        if (!std::strcmp(one.name, name)) return int(&one - known);
    return -1;
}

int quire_replay(const quire_call *calls, int64_t count) {
    for (int64_t i = 0; i < count; i++)
        if (int result = known[calls[i].function].make(calls[i].arguments)) return result;
    return 0;
}
}

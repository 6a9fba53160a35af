// Checks of the library by its caller, and the constants that the whole C interface shares.
#pragma once
#include <cstdint>

extern "C" {

// Changes with a function's arguments or a field's meaning. Layouts of structures are compared by themselves.
enum { QAQ_INTERFACE = 20 };

enum { QAQ_WIDTHS = 14 };  // of rows: 0..8, 10, 12, 14, 16 and 32 half bits; a tag's nibble is an index into them

enum QaqType : int32_t { QAQ_HALF = 0, QAQ_BFLOAT16 = 1, QAQ_FLOAT = 2 };

// What functions return that do not do what they are asked to. Nothing was read through a pointer that they do not
// know to be good; see checks.h.
enum QaqRefusal : int32_t {
    QAQ_NO_MEMORY = -1,  // for scratch
    QAQ_NULL = -2,       // a pointer that is needed is null
    QAQ_SIZE = -3,       // a number of heads, tokens, rows or bytes does not fit the others
    QAQ_RANGE = -4,      // a type, a width, an index or a position is none
};

// A field of a structure of the interface. One without a name is the structure itself.
struct QaqField {
    const char *structure, *name;
    int64_t offset, size;  // bytes
};

int qaq_interface(void);

// The fields of all structures, in order. The last entry has no structure.
const QaqField* qaq_fields(void);

// The instruction set in use: "avx512", "avx2" or "generic".
const char* qaq_isa(void);

// Uses the named instruction set from now on. Returns 0, or -1 if the processor does not have it; then nothing changes.
int qaq_use(const char* isa);
}

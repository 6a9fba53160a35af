// Planes become levels. A word has one plane of an octet (8 dims) of 4 tokens, a byte each.
//
// Up to 3 planes: 8 levels fit the 8 bytes that one PRMT picks from, low and high bytes apart; it picks for 4 codes at
// once. 4 planes and more are a sign and a size, since levels are symmetric: 8 or 16 sizes in 1 or 2 pools, of which
// the upper plane selects. Levels of more planes are read from memory. Tables ignore planes that an octet of fewer
// planes does not have, so what was read in their place does not matter.
#pragma once
#include "structures.h"

// The planes of one octet of 4 tokens, and where its levels are.
template <int D>
struct Planes {
    static constexpr int HELD = D < DEEPER ? D : 8;
    uint32_t plane[HELD], negative;
};

// Args: at: the octet's tokens in unit 0 of a tile of `rows` rows. shift: dims that are left out.
template <int D>
QAQ_INLINE Planes<D> planes_of(const uint8_t* units, const uint8_t* at, uint32_t rows, int shift) {
    Planes<D> found;
    const uint2 place = D > 4 ? read<uint2>(units) : uint2{read<uint32_t>(units), 0};
#pragma unroll
    for (int p = 0; p < Planes<D>::HELD; p++) {
        const uint32_t unit = (p < 4 ? place.x : place.y) >> (8 * (p & 3)) & 255;
        found.plane[p] = read<uint32_t>(at + static_cast<uint64_t>(unit) * rows) >> shift;
    }
    if (D >= 4 && D < DEEPER) {
        found.negative = ~found.plane[0];
#pragma unroll
        for (int p = 1; p < Planes<D>::HELD; p++) found.plane[p] ^= found.negative;
    }
    return found;
}

// Bits of the dims S and S + 4 of 4 tokens, a nibble each, token after token.
template <int S>
QAQ_INLINE uint32_t bits_of(uint32_t plane) {
    return plane >> S & 0x11111111u;
}

// The last three planes (or fewer) as a number in each nibble.
template <int D, int S>
QAQ_INLINE uint32_t last_three(const Planes<D>& of) {
    const uint32_t last = bits_of<S>(of.plane[D - 1]);
    if (D == 1) return last;
    const uint32_t before = of.plane[D > 1 ? D - 2 : 0], first = of.plane[D > 2 ? D - 3 : 0];
    const uint32_t two = ((S ? before >> (S - 1) : before << 1) & 0x22222222u) | last;
    if (D == 2) return two;
    return ((S > 1 ? first >> (S - 2) : first << (2 - S)) & 0x44444444u) | two;
}

QAQ_INLINE uint32_t choose(uint32_t mask, uint32_t yes, uint32_t no) { return (yes & mask) | (no & ~mask); }

// Levels of the dims S and S + 4 of 4 tokens as pairs of halves. KEYS: out[t], dims S and S + 4 of token t. Values:
// dim S of tokens 0 and 1, and of 2 and 3, then dim S + 4 of the same.
template <int D, int S, bool KEYS>
QAQ_INLINE void levels_of(const Planes<D>& of, const uint4 (&pools)[POOLS], uint32_t (&out)[4]) {
    const uint32_t codes = last_three<D, S>(of);
    const uint32_t signs = D >= 4 ? bits_of<S>(of.negative) : 0;
    const uint32_t upper = D >= 5 ? bits_of<S>(of.plane[D >= 5 ? D - 4 : 0]) : 0;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int by = 16 * half;
        const uint32_t code = codes >> by;
        uint32_t low = pick(pools[0].x, pools[0].y, code), high = pick(pools[0].z, pools[0].w, code);
        if (D >= 5) {
            const uint32_t mask = pick(0xff00u, 0, upper >> by);
            low = choose(mask, pick(pools[1].x, pools[1].y, code), low);
            high = choose(mask, pick(pools[1].z, pools[1].w, code), high);
        }
        if (D >= 4) high |= pick(0x8000u, 0, signs >> by);
        if (KEYS) {
            out[2 * half] = pick(low, high, 0x5140);
            out[2 * half + 1] = pick(low, high, 0x7362);
        } else {
            out[half] = pick(low, high, 0x6240);
            out[2 + half] = pick(low, high, 0x7351);
        }
    }
}

// Four planes as a number in each nibble.
template <int S>
QAQ_INLINE uint32_t four_planes(const uint32_t* plane) {
    const uint32_t first = plane[0] << (3 - S);
    const uint32_t second = S > 2 ? plane[1] >> 1 : plane[1] << (S > 2 ? 0 : 2 - S);
    const uint32_t third = S > 1 ? plane[2] >> (S > 1 ? S - 1 : 0) : plane[2] << (S > 1 ? 0 : 1 - S);
    return (first & 0x88888888u) | (second & 0x44444444u) | (third & 0x22222222u) | bits_of<S>(plane[3]);
}

// The same of more planes, one level after the other.
template <int S, bool KEYS>
QAQ_INLINE void deep_levels(const Planes<DEEPER>& of, const uint16_t* levels, uint32_t (&out)[4]) {
    const uint32_t high = four_planes<S>(of.plane), low = four_planes<S>(of.plane + 4);
    const uint32_t codes[2] = {choose(0xf0f0f0f0u, high << 4, low), choose(0xf0f0f0f0u, high, low >> 4)};
    uint32_t seen[2][4];
#pragma unroll
    for (int j = 0; j < 2; j++)
#pragma unroll
        for (int t = 0; t < 4; t++) seen[j][t] = read<uint16_t>(levels + (codes[j] >> (8 * t) & 255));
#pragma unroll
    for (int i = 0; i < 4; i++)
        out[i] = KEYS ? seen[0][i] | seen[1][i] << 16 : seen[i >> 1][2 * (i & 1)] | seen[i >> 1][2 * (i & 1) + 1] << 16;
}

// What decodes an octet of D planes.
template <int D, bool KEYS>
struct Decoder {
    uint4 pools[POOLS];
    const uint16_t* levels;

    // Args: at: of the octet among those of all widths.
    QAQ_INLINE Decoder(const Layout& layout, int at) {
        if (D < DEEPER) {
#pragma unroll
            for (int i = 0; i < (D == 5 ? 2 : 1); i++)
                pools[i] = read<uint4>(layout.pools + static_cast<uint32_t>(POOLS * at + i));
        } else {
            levels = layout.levels + 256 * read<uint8_t>(layout.planes + at);
        }
    }

    template <int S>
    QAQ_INLINE void operator()(const Planes<D>& of, uint32_t (&out)[4]) const;
};

template <int D, bool KEYS, int S>
struct Levels {
    static QAQ_INLINE void of(const Decoder<D, KEYS>& decoder, const Planes<D>& planes, uint32_t (&out)[4]) {
        levels_of<D, S, KEYS>(planes, decoder.pools, out);
    }
};
template <bool KEYS, int S>
struct Levels<DEEPER, KEYS, S> {
    static QAQ_INLINE void of(const Decoder<DEEPER, KEYS>& decoder, const Planes<DEEPER>& planes, uint32_t (&out)[4]) {
        deep_levels<S, KEYS>(planes, decoder.levels, out);
    }
};
template <int D, bool KEYS>
template <int S>
QAQ_INLINE void Decoder<D, KEYS>::operator()(const Planes<D>& of, uint32_t (&out)[4]) const {
    Levels<D, KEYS, S>::of(*this, of, out);
}

// Calls `step` with the number of planes as a constant: 1 to DEEPER. It is the same in a whole warp.
template <template <int> class Step, class... Given>
QAQ_INLINE void by_planes(int deepest, Given&... given) {
#ifdef QAQ_ONLY  // to count instructions: as if all octets had so many planes
    if (deepest) Step<QAQ_ONLY>::run(given...);
#else
    if (deepest == 2)
        Step<2>::run(given...);
    else if (deepest == 1)
        Step<1>::run(given...);
    else if (deepest == 3)
        Step<3>::run(given...);
    else if (deepest == 4)
        Step<4>::run(given...);
    else if (deepest == 5)
        Step<5>::run(given...);
    else if (deepest >= DEEPER)
        Step<DEEPER>::run(given...);
#endif
}

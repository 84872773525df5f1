// Rows of activations times a matrix of 4-bit codes, with what comes before and after.
//
// A byte is two codes, of which the table has the values side by side: one look-up in shared
// memory makes a register of a matrix operand. The table is there once for each bank, so lanes
// never wait for each other.
//
// The codebook's values are stretched before they are rounded to the rows' type: with this
// factor all of NF4 and FP4 lie near numbers of 8 bits, and lose half of what they would else.
// Scales are multiplied in float32, with sums of 64 inputs.
//
// `few` serves 1 to 4 rows on any GPU with mma.sync, `wide` more on Hopper, `dense` makes the
// matrix dense for the library. Sums have an order that depends on sizes alone.
#include "device.cuh"

struct Arguments {
    const uint16 *rows;      // [num_rows, num_inputs]
    const uint8 *codes;      // [num_lines, num_inputs / 2]; num_lines is num_outputs, gated twice
    const float *absmax;     // [num_lines, num_inputs / 64]
    const float *codebook;   // [16]
    const uint16 *bias;      // [num_lines] or null
    const uint16 *gain;      // [num_inputs] of the rows' norm, or null: `few` alone has it
    const uint16 *residual;  // [num_rows, num_outputs] that is added to, or null; may be `out`
    uint16 *out;             // [num_rows, num_outputs]
    int num_rows, num_outputs, num_inputs;
    int gated;               // whether the result is silu(gate) * up, lines being gate, then up
    float eps;               // of the norm
};

constexpr float STRETCH = 1.43671f;
constexpr uint32 TABLE_BYTES = 256 * 32 * 4;

DEVICE int clamp_below(int v, int end) { return v < end ? v : end - 1; }
DEVICE float round_element(float v) { return widen((uint16)(pack(v, v) & 0xffff)); }

// Fills the table, at the beginning of shared memory: byte b's pair at 128 b + 4 lane. The first
// value is the high nibble's.
DEVICE void fill_table(const float *codebook, int num_warps) {
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    uint32 own = pack(STRETCH * codebook[lane & 15], 0.0f) & 0xffff;
    for (int high = warp; high < 16; high += num_warps) {
        uint32 first = broadcast(own, high);
#pragma unroll
        for (int low = 0; low < 16; low++)
            shared<uint32>((high * 16 + low) * 128 + lane * 4) = first | broadcast(own, low) << 16;
    }
}

// Looks up the pair of a word's byte.
template <int BYTE>
DEVICE uint32 look_up(uint32 word, uint32 lane_at) {
    uint32 at = BYTE == 0 ? word << 7 : word >> (8 * BYTE - 7);
    return shared<uint32>((at & 0x7f80) | lane_at);
}

// Returns the bits of one output, given its stretched sum; with gate and up, both.
DEVICE uint32 finish(const Arguments &my, float total, float up_total, int row, int output) {
    total *= 1 / STRETCH, up_total *= 1 / STRETCH;
    if (my.bias) {
        total += widen(my.bias[output]);
        if (my.gated) up_total += widen(my.bias[my.num_outputs + output]);
    }
    float result = round_element(total);
    if (my.gated) {
        float activated = round_element(result / (1 + exponential(-result)));
        result = round_element(activated * round_element(up_total));
    }
    if (my.residual) result += widen(my.residual[(uint64)row * my.num_outputs + output]);
    return pack(result, 0.0f) & 0xffff;
}

#include "four_bit_few.cuh"
#include "four_bit_wide.cuh"

// ---------------------------------------------------------------------------- dense
//
// Writes the values themselves, [num_outputs, num_inputs]: each product in float32, then rounded.

DEVICE void write_dense(const Arguments &my) {
    uint32 table = (threadIdx.x & 31) * 4;
    for (int code = threadIdx.x >> 5; code < 16; code += blockDim.x >> 5)
        shared<float>(table + code * 128) = my.codebook[code];
    sync_block();
    // A word is 8 values, and 8 words share a scale.
    uint64 num_words = (uint64)my.num_outputs * my.num_inputs >> 3;
    uint64 stride = (uint64)gridDim.x * blockDim.x;
    uint64 begin = (uint64)blockIdx.x * blockDim.x + threadIdx.x;
    for (; begin < num_words; begin += 4 * stride) {
        uint32 words[4];
        float scales[4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            uint64 at = begin + i * stride;
            if (at >= num_words) break;
            words[i] = stream_load(my.codes + at * 4);
            scales[i] = as_float(stream_load(my.absmax + (at >> 3)));
        }
#pragma unroll
        for (int i = 0; i < 4; i++) {
            uint64 at = begin + i * stride;
            if (at >= num_words) break;
            uint32 pairs[4];
#pragma unroll
            for (int byte = 0; byte < 4; byte++) {
                uint32 high = words[i] >> (8 * byte + 4) & 15, low = words[i] >> (8 * byte) & 15;
                pairs[byte] = pack(shared<float>(table + high * 128) * scales[i],
                                   shared<float>(table + low * 128) * scales[i]);
            }
            *(Four *)(my.out + at * 8) = Four{pairs[0], pairs[1], pairs[2], pairs[3]};
        }
    }
}

// ---------------------------------------------------------------------------- kernels
//
// One is compiled at a time: INSTANCE is defined as one of these, with numbers.

#define FEW(rows, warps, depth, programs)                                            \
    KERNEL(32 * warps, programs) multiply_few(const Arguments my) {                  \
        Few<rows, warps, depth>::multiply(my);                                       \
    }
#define WIDE(tokens, step, stages, programs)                                         \
    KERNEL(384, programs) multiply_wide(const Arguments my, MAP codes, MAP rows) {   \
        Wide<tokens, step, stages, programs>::multiply(my, codes, rows);             \
    }
#define DENSE KERNEL(256, 8) make_dense(const Arguments my) { write_dense(my); }

INSTANCE

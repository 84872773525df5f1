// 1 to 4 rows times a matrix of 4-bit codes: part of four_bit.cu.
//
// A warp multiplies 16 lines by 256 inputs at a time; lane 4 g + t has lines g and g + 8. Its
// plain loads of 16 bytes are, of the 4 blocks of 32 bytes of a line, those that say t:
//
//              │ block 0   │ block 1   │ block 2   │ block 3   │
//     unit 0   │ t=0 │ t=1 │     │     │ t=2 │ t=3 │     │     │
//     unit 1   │     │     │ t=0 │ t=1 │     │     │ t=2 │ t=3 │
//
// A word of them serves two products: bytes 0 and 1 are the lane's a[0] and a[2] of the first,
// bytes 2 and 3 of the second. The matrix unit numbers its inputs in another order, on which sums
// do not depend as long as the rows are laid beside the codes in the same one. In one product the lanes t < 2 have another block than the lanes
// t > 1, and so another scale. Their sums stay apart, because columns 0 to 3 are the rows as
// t < 2 multiply them and zeros for t > 1, columns 4 to 7 the reverse. Then a lane's columns,
// 2 t and 2 t + 1, are sums of the very block whose scale it loaded.
//
// The warps of a program share a line's inputs, and its tiles of 16 lines (gated: 8 of gate, 8
// of up) are every so-many-th. After TURNS tiles the warps' sums meet in shared memory.

template <int ROWS, int WARPS, int DEPTH>
struct Few {
    static_assert(ROWS <= 4);
    static constexpr int TURNS = 8;
    static constexpr uint32 SUM_BYTES = 4 * 16 * 4;  // [row][line] of a warp's tile
    static constexpr uint32 SUMS = TABLE_BYTES, STAGED = SUMS + TURNS * WARPS * SUM_BYTES;

    // What a lane holds of a tile and 256 inputs: [unit], [line][unit].
    struct Share { Four first[2], second[2]; float scales[2][2]; };
    struct Place { int tile, run; };

    static DEVICE void load_share(Share &share, const Arguments &my, Place place) {
        int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
        int num_blocks = my.num_inputs >> 6;
        int first, second;
        if (my.gated) {
            first = clamp_below(place.tile * 8 + g, my.num_outputs);
            second = my.num_outputs + first;
        } else {
            first = clamp_below(place.tile * 16 + g, my.num_outputs);
            second = clamp_below(place.tile * 16 + g + 8, my.num_outputs);
        }
        int block = 4 * place.run + (t & 2);
        uint64 first_line = (uint64)first * num_blocks, second_line = (uint64)second * num_blocks;
#pragma unroll
        for (int unit = 0; unit < 2; unit++) {
            int at = clamp_below(block + unit, num_blocks);
            const uint8 *codes = my.codes + (t & 1) * 16;
            share.first[unit] = stream_load_four(codes + (first_line + at) * 32);
            share.second[unit] = stream_load_four(codes + (second_line + at) * 32);
        }
        if (num_blocks & 1) {
#pragma unroll
            for (int unit = 0; unit < 2; unit++) {
                int at = clamp_below(block + unit, num_blocks);
                share.scales[0][unit] = as_float(stream_load(my.absmax + first_line + at));
                share.scales[1][unit] = as_float(stream_load(my.absmax + second_line + at));
            }
        } else {
            int at = clamp_below(block, num_blocks - 1);
            Two a = stream_load_two(my.absmax + first_line + at);
            Two b = stream_load_two(my.absmax + second_line + at);
            share.scales[0][0] = as_float(a.x), share.scales[0][1] = as_float(a.y);
            share.scales[1][0] = as_float(b.x), share.scales[1][1] = as_float(b.y);
        }
    }

    // Where 8 inputs of a row, a granule, lie: a lane reads those of its word beside each other.
    static DEVICE uint32 staged_at(int granule, int row) {
        int run = granule >> 5, t = granule >> 3 & 2 | granule >> 2 & 1;
        int unit = granule >> 3 & 1, word = granule & 3;
        return STAGED + ((((run * 2 + unit) * 4 + word) * ROWS + row) * 4 + t) * 16;
    }

    // Brings the rows to shared memory, zeros behind them, and normalizes them.
    static DEVICE void stage_rows(const Arguments &my, int num_warps) {
        int num_granules = my.num_inputs >> 3, num_staged = (my.num_inputs + 255) / 256 * 32;
        int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
        for (int row = 0; row < my.num_rows; row++) {
            float squares = 0;
            for (int i = threadIdx.x; i < num_staged; i += blockDim.x) {
                Four v = {0, 0, 0, 0};
                if (i < num_granules)
                    v = *(const Four *)(my.rows + (uint64)row * my.num_inputs + i * 8);
                shared<Four>(staged_at(i, row)) = v;
                if (!my.gain) continue;
                uint32 words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
                for (int k = 0; k < 4; k++) {
                    float a = widen(words[k] & 0xffff), b = widen(words[k] >> 16);
                    squares += a * a + b * b;
                }
            }
            if (!my.gain) continue;
#pragma unroll
            for (int with = 16; with; with >>= 1) squares += exchange(squares, with);
            if (lane == 0) shared<float>(SUMS + (row * WARPS + warp) * 4) = squares;
        }
        if (!my.gain) return;
        sync_block();
        for (int row = 0; row < my.num_rows; row++) {
            float squares = 0;
            for (int other = 0; other < num_warps; other++)
                squares += shared<float>(SUMS + (row * WARPS + other) * 4);
            float scale = reciprocal_root(squares / my.num_inputs + my.eps);
            for (int i = threadIdx.x; i < num_granules; i += blockDim.x) {
                uint32 at = staged_at(i, row);
                Four v = shared<Four>(at), gain = *(const Four *)(my.gain + i * 8);
                uint32 words[4] = {v.x, v.y, v.z, v.w};
                uint32 gains[4] = {gain.x, gain.y, gain.z, gain.w};
#pragma unroll
                for (int k = 0; k < 4; k++) {
                    uint32 normed = pack(widen(words[k] & 0xffff) * scale,
                                         widen(words[k] >> 16) * scale);
                    words[k] = pack(widen(normed & 0xffff) * widen(gains[k] & 0xffff),
                                    widen(normed >> 16) * widen(gains[k] >> 16));
                }
                shared<Four>(at) = Four{words[0], words[1], words[2], words[3]};
            }
        }
        sync_block();  // the place of the squares is used again
    }

    static DEVICE void multiply_share(float (&total)[4], const Share &share, uint32 lane_at,
                                      uint32 rows, bool there) {
        float sums[2][4] = {};
#pragma unroll
        for (int word = 0; word < 4; word++) {
#pragma unroll
            for (int unit = 0; unit < 2; unit++) {
                const Four &x = share.first[unit], &y = share.second[unit];
                uint32 first = word == 0 ? x.x : word == 1 ? x.y : word == 2 ? x.z : x.w;
                uint32 second = word == 0 ? y.x : word == 1 ? y.y : word == 2 ? y.z : y.w;
                const uint32 a[4] = {look_up<0>(first, lane_at), look_up<0>(second, lane_at),
                                     look_up<1>(first, lane_at), look_up<1>(second, lane_at)};
                const uint32 c[4] = {look_up<2>(first, lane_at), look_up<2>(second, lane_at),
                                     look_up<3>(first, lane_at), look_up<3>(second, lane_at)};
                Four b = {0, 0, 0, 0};
                if (there) b = shared<Four>(rows + (unit * 4 + word) * ROWS * 64);
                multiply_add(sums[unit], a, b.x, b.y);
                multiply_add(sums[unit], c, b.z, b.w);
            }
        }
#pragma unroll
        for (int i = 0; i < 4; i++) {
            total[i] += share.scales[i >> 1][0] * sums[0][i];
            total[i] += share.scales[i >> 1][1] * sums[1][i];
        }
    }

    // Writes the results of `turns` tiles from `tile` on, whose sums have met.
    static DEVICE void write(const Arguments &my, int tile, int turns, int num_warps) {
        int per_tile = my.gated ? 8 : 16;
        for (int i = threadIdx.x; i < turns * my.num_rows * per_tile; i += blockDim.x) {
            int local = i % per_tile, row = i / per_tile % my.num_rows;
            int turn = i / per_tile / my.num_rows;
            uint32 from = SUMS + turn * WARPS * SUM_BYTES + (row * 16 + local) * 4;
            float sum = 0, up_sum = 0;
            for (int warp = 0; warp < num_warps; warp++) {
                sum += shared<float>(from + warp * SUM_BYTES);
                if (my.gated) up_sum += shared<float>(from + warp * SUM_BYTES + 32);
            }
            int output = (tile + turn * (int)gridDim.x) * per_tile + local;
            if (output >= my.num_outputs) continue;
            uint16 *to = my.out + (uint64)row * my.num_outputs + output;
            *to = (uint16)finish(my, sum, up_sum, row, output);
        }
    }

    static DEVICE void multiply(const Arguments &my) {
        int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, num_warps = blockDim.x >> 5;
        int g = lane >> 2, t = lane & 3;
        let_next_start();
        int num_runs = (my.num_inputs + 255) / 256;  // at least as many as warps
        int per_tile = my.gated ? 8 : 16;
        int num_tiles = (my.num_outputs + per_tile - 1) / per_tile;
        int own_tiles = (num_tiles - 1 - (int)blockIdx.x) / (int)gridDim.x + 1;

        Place next = {(int)blockIdx.x, warp};
        auto advance = [&] {
            next.run += num_warps;
            if (next.run >= num_runs) next.run = warp, next.tile += gridDim.x;
        };
        Share ring[DEPTH];
#pragma unroll
        for (int i = 0; i < DEPTH; i++) {
            if (next.tile < num_tiles) load_share(ring[i], my, next);
            advance();
        }
        fill_table(my.codebook, num_warps);
        wait_for_previous();
        stage_rows(my, num_warps);
        sync_block();

        bool there = g >> 2 == t >> 1 && (g & 3) < my.num_rows;
        uint32 lane_rows = STAGED + (g & 3) * 64 + t * 16;
        float total[4] = {};
        int run = warp, tile = blockIdx.x, turn = 0;
        int count = own_tiles * ((num_runs - 1 - warp) / num_warps + 1);
        for (int begin = 0; begin < count; begin += DEPTH) {
#pragma unroll
            for (int slot = 0; slot < DEPTH; slot++) {
                if (begin + slot >= count) break;
                multiply_share(total, ring[slot], lane * 4, lane_rows + run * 8 * ROWS * 64, there);
                if (next.tile < num_tiles) load_share(ring[slot], my, next);
                advance();
                run += num_warps;
                if (run < num_runs) continue;
                // The tile is done: columns 0 to 3 and 4 to 7 are halves of the same sums.
                uint32 own = SUMS + (turn * WARPS + warp) * SUM_BYTES;
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    float both = total[i] + exchange(total[i], 2);
                    if (t < 2)
                        shared<float>(own + ((t * 2 + (i & 1)) * 16 + g + (i >> 1) * 8) * 4) = both;
                    total[i] = 0;
                }
                run = warp, turn++;
                if (turn < TURNS && turn < own_tiles) continue;
                sync_block();
                write(my, tile, turn, num_warps);
                tile += turn * gridDim.x, own_tiles -= turn, turn = 0;
                sync_block();
            }
        }
    }
};

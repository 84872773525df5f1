// More rows times a matrix of 4-bit codes, on Hopper: part of four_bit.cu.
//
// A program multiplies 128 lines (gated: 64 of gate, 64 of up), 64 a group of four warps, with up
// to TOKENS rows. One warp more brings codes, scales and rows, STEP blocks of 64 inputs at a time,
// to a ring of STAGES stages in shared memory: codes before the kernel ahead has ended, rows
// behind it. All of them lie there as they lay in memory.
//
// Of the 8 bytes of a line that are 16 inputs, lane 4 g + t looks up those that the matrix unit
// takes from it, and all four lanes load all bytes:
//
//     byte     0      1      2      3      4      5      6      7
//     lane   t = 0  t = 1  t = 2  t = 3  t = 0  t = 1  t = 2  t = 3
//            a[0] of line g, a[1] of g + 8      a[2]              a[3]
//
// So one load of 16 bytes is half a block of a line, and two products. While the unit multiplies
// one half, the next is looked up. The sums of a block are multiplied with scales and added. The
// programs of a cluster, which share the inputs of the same lines, then read each other's sums.

template <int TOKENS, int STEP, int STAGES, int PROGRAMS>
struct Wide {
    static constexpr int GROUPS = 2, WORKERS = 128 * GROUPS;
    static constexpr int LINES = 64 * GROUPS, LINE_BYTES = 32 * STEP, SUMS = TOKENS / 2;
    static constexpr uint32 CODE_BYTES = LINES * LINE_BYTES, BLOCK_BYTES = TOKENS * 128;
    static constexpr uint32 STAGE_BYTES = CODE_BYTES + STEP * BLOCK_BYTES;
    static constexpr uint32 SCALE_BYTES = LINES * STEP * 4;
    static constexpr uint32 RING = TABLE_BYTES, SCALES = RING + STAGES * STAGE_BYTES;
    static constexpr uint32 FULL = SCALES + STAGES * SCALE_BYTES, EMPTY = FULL + 8 * STAGES;
    static constexpr int WIDTH = LINES + 4;  // floats of a row's sums

    // Gated, the first group has gate's lines, the second up's.
    static DEVICE int first_line(const Arguments &my, int group) {
        if (!my.gated) return blockIdx.x * LINES + group * 64;
        return group * my.num_outputs + blockIdx.x * 64;
    }

    static DEVICE void load_weights(const Arguments &my, const Map &codes, int slot, int step) {
        int lane = threadIdx.x & 31, num_blocks = my.num_inputs >> 6;
        uint32 full = FULL + 8 * slot;
        if (lane == 0) {
            arrive_expecting(full, STAGE_BYTES);  // the rows, too
#pragma unroll
            for (int group = 0; group < GROUPS; group++)
                copy_box(RING + slot * STAGE_BYTES + group * 64 * LINE_BYTES, codes,
                         step * LINE_BYTES, first_line(my, group), full);
        }
        int num_lines = my.gated ? 2 * my.num_outputs : my.num_outputs;
        bool whole = num_blocks % STEP == 0;
#pragma unroll
        for (int local = lane; local < LINES; local += 32) {
            int line = clamp_below(first_line(my, local >> 6) + (local & 63), num_lines);
            const float *from = my.absmax + (uint64)line * num_blocks + step * STEP;
            uint32 to = SCALES + slot * SCALE_BYTES + local * STEP * 4;
            if (whole) {
                copy_async<STEP * 4>(to, from);
            } else {
#pragma unroll
                for (int block = 0; block < STEP; block++) {
                    bool there = step * STEP + block < num_blocks;
                    copy_async_or_zero(to + block * 4, there ? from + block : my.absmax, there);
                }
            }
        }
        arrive_after_copies(full);
    }

    static DEVICE void load_rows(const Map &rows, int slot, int step, int first_row) {
        if ((threadIdx.x & 31) != 0) return;
        uint32 to = RING + slot * STAGE_BYTES + CODE_BYTES;
#pragma unroll
        for (int block = 0; block < STEP; block++)
            copy_box(to + block * BLOCK_BYTES, rows, (step * STEP + block) * 128, first_row,
                     FULL + 8 * slot);
    }

    static DEVICE void produce(const Arguments &my, const Map &codes, const Map &rows, int begin,
                               int end, int first_row) {
        int ahead = end - begin < STAGES ? end - begin : STAGES;
        for (int i = 0; i < ahead; i++) load_weights(my, codes, i, begin + i);
        wait_for_previous();
        for (int i = 0; i < ahead; i++) load_rows(rows, i, begin + i, first_row);
        int slot = 0;
        uint32 parity = 0;
        for (int step = begin + ahead; step < end; step++) {
            wait_barrier(EMPTY + 8 * slot, parity);
            load_weights(my, codes, slot, step);
            load_rows(rows, slot, step, first_row);
            if (++slot == STAGES) slot = 0, parity ^= 1;
        }
    }

    // Loads a half of a block, of lines g and g + 8.
    static DEVICE void load_codes(Four (&words)[2], uint32 codes, int half) {
        words[0] = load_four(codes ^ half * 16);
        words[1] = load_four((codes ^ half * 16) + 8 * LINE_BYTES);
    }

    static DEVICE void load_scales(float (&scales)[2], uint32 at) {
        scales[0] = load_float(at), scales[1] = load_float(at + 8 * STEP * 4);
    }

    // Looks up what load_codes loaded: [product][register of it].
    static DEVICE void look_up_half(uint32 (&a)[2][4], const Four (&words)[2], uint32 own_byte,
                                    uint32 table) {
#pragma unroll
        for (int line = 0; line < 2; line++) {
            a[0][line] = load_value(pick_byte(words[line].x, own_byte) * 128 + table);
            a[0][2 + line] = load_value(pick_byte(words[line].y, own_byte) * 128 + table);
            a[1][line] = load_value(pick_byte(words[line].z, own_byte) * 128 + table);
            a[1][2 + line] = load_value(pick_byte(words[line].w, own_byte) * 128 + table);
        }
    }

    static DEVICE void begin_half(float (&sums)[SUMS], const uint32 (&a)[2][4], uint32 columns,
                                  bool adds) {
        begin_group();
        multiply_group(sums, a[0], describe_columns(columns), adds);
        multiply_group(sums, a[1], describe_columns(columns + 2), 1);
        commit_group();
    }

    // Waits until at most LEFT halves are being multiplied, these not among them.
    template <int LEFT>
    static DEVICE void end_half(uint32 (&a)[2][4]) {
        wait_groups<LEFT>();
#pragma unroll
        for (int i = 0; i < 8; i++) keep(a[i >> 2][i & 3]);
    }

    // Multiplies one step or more.
    static DEVICE void consume(float (&total)[SUMS], int begin, int end) {
        int lane = threadIdx.x & 31, own_line = (threadIdx.x >> 5) * 16 + (lane >> 2);
        int swizzle = STEP == 4 ? own_line & 7 : own_line >> 1 & 3;  // the tensor map's
        uint32 own_byte = byte_picker(lane & 3), table = shared_address(lane * 4);
        uint32 columns = name_columns(shared_address(RING + CODE_BYTES));
        uint32 codes = shared_address(RING + own_line * LINE_BYTES + swizzle * 16);
        uint32 scales_at = shared_address(SCALES + own_line * STEP * 4);
        keep(own_byte), keep(table), keep(columns), keep(codes), keep(scales_at);
        float sums[SUMS] = {}, scales[2], next_scales[2];
        Four words[2];
        uint32 a[2][2][4], stage = 0, parity = 0;
        int slot = 0;
        wait_barrier(FULL, 0);
        load_scales(scales, scales_at);
        load_codes(words, codes, 0);
        look_up_half(a[0], words, own_byte, table);
        for (int step = begin; step < end; step++) {
            bool wraps = slot + 1 == STAGES;
            int next_slot = wraps ? 0 : slot + 1;
            uint32 next_stage = wraps ? 0 : stage + STAGE_BYTES;
            if (wraps) parity ^= 1;
#pragma unroll
            for (int half = 0; half < 2 * STEP; half++) {
                int now = half & 1, next = now ^ 1, block = half >> 1;
                begin_half(sums, a[now],
                           columns + (stage >> 4) + block * (BLOCK_BYTES >> 4) + now * 4, now);
                bool more = true;
                if (half + 1 < 2 * STEP) {
                    if (now)
                        load_scales(next_scales, scales_at + slot * SCALE_BYTES + (block + 1) * 4);
                    load_codes(words, codes + stage, half + 1);
                } else if (step + 1 < end) {
                    wait_barrier(FULL + 8 * next_slot, parity);
                    load_scales(next_scales, scales_at + next_slot * SCALE_BYTES);
                    load_codes(words, codes + next_stage, 0);
                } else {
                    more = false;
                }
                end_half<1>(a[next]);
                if (more) look_up_half(a[next], words, own_byte, table);
                if (!now) continue;
                end_half<0>(a[now]);
#pragma unroll
                for (int i = 0; i < SUMS; i++) keep(sums[i]);
#pragma unroll
                for (int i = 0; i < SUMS; i++) total[i] += scales[i >> 1 & 1] * sums[i];
                scales[0] = next_scales[0], scales[1] = next_scales[1];
            }
            sync_warp();
            if (lane == 0) arrive(EMPTY + 8 * slot);
            slot = next_slot, stage = next_stage;
        }
    }

    // Adds up the cluster's sums, which lie where the ring was, and writes this program's part.
    static DEVICE void write(const Arguments &my, int first_row, int num_rows) {
        int per_tile = my.gated ? LINES / 2 : LINES, quads = per_tile / 4;
        int first = blockIdx.y * WORKERS + threadIdx.x, num_threads = gridDim.y * WORKERS;
        for (int i = first; i < num_rows * quads; i += num_threads) {
            int local = i / quads, line = i % quads * 4, row = first_row + local;
            int output = blockIdx.x * per_tile + line;
            if (output >= my.num_outputs) continue;
            float sums[4] = {}, up_sums[4] = {};
            for (int rank = 0; rank < (int)gridDim.y; rank++) {
                Floats v = cluster_load_four(RING + (local * WIDTH + line) * 4, rank);
                sums[0] += v.x, sums[1] += v.y, sums[2] += v.z, sums[3] += v.w;
                if (!my.gated) continue;
                v = cluster_load_four(RING + (local * WIDTH + per_tile + line) * 4, rank);
                up_sums[0] += v.x, up_sums[1] += v.y, up_sums[2] += v.z, up_sums[3] += v.w;
            }
            uint32 bits[4] = {};
#pragma unroll
            for (int k = 0; k < 4; k++)
                if (output + k < my.num_outputs)
                    bits[k] = finish(my, sums[k], up_sums[k], row, output + k);
            uint16 *to = my.out + (uint64)row * my.num_outputs + output;
            if ((my.num_outputs & 3) == 0) {
                *(Two *)to = Two{bits[0] | bits[1] << 16, bits[2] | bits[3] << 16};
            } else {
#pragma unroll
                for (int k = 0; k < 4; k++)
                    if (output + k < my.num_outputs) to[k] = bits[k];
            }
        }
    }

    static DEVICE void work(const Arguments &my, int begin, int end, int first_row, int num_rows) {
        int lane = threadIdx.x & 31, t = lane & 3;
        float total[SUMS] = {};
        fill_table(my.codebook, WORKERS / 32);
        sync_some(WORKERS);
        consume(total, begin, end);
        wait_for_previous();
        sync_some(WORKERS);
        // The sums take the ring's place, float32 [TOKENS][WIDTH].
        int line = (threadIdx.x >> 5) * 16 + (lane >> 2);
#pragma unroll
        for (int i = 0; i < SUMS; i++) {
            int row = i / 4 * 8 + t * 2 + (i & 1);
            shared<float>(RING + (row * WIDTH + line + (i >> 1 & 1) * 8) * 4) = total[i];
        }
        if (gridDim.y > 1) sync_cluster();
        else sync_some(WORKERS);
        write(my, first_row, num_rows);
        if (gridDim.y > 1) sync_cluster();  // the others may still read
    }

    // A grid of tiles, programs of a cluster, and TOKENS rows each. No program is without a step.
    static DEVICE void multiply(const Arguments &my, const Map &codes, const Map &rows) {
        let_next_start();
        int num_steps = ((my.num_inputs >> 6) + STEP - 1) / STEP;
        int begin = num_steps * blockIdx.y / gridDim.y;
        int end = num_steps * (blockIdx.y + 1) / gridDim.y;
        int first_row = blockIdx.z * TOKENS;
        int num_rows = my.num_rows - first_row < TOKENS ? my.num_rows - first_row : TOKENS;
        if (threadIdx.x == WORKERS) {
            prefetch_map(rows);
            for (int i = 0; i < STAGES; i++) {
                begin_barrier(FULL + 8 * i, 33);  // the warp that copies, and the announcement
                begin_barrier(EMPTY + 8 * i, WORKERS / 32);
            }
            show_barriers();
        }
        sync_block();
        // Many rows are many sums: who has them gets registers from the others, which are four
        // warps because those of four are given together.
        if (threadIdx.x < WORKERS) {
            if constexpr (TOKENS >= 64) more_registers<PROGRAMS == 2 ? 104 : 232>();
            work(my, begin, end, first_row, num_rows);
        } else {
            if constexpr (TOKENS >= 64) fewer_registers<PROGRAMS == 2 ? 32 : 40>();
            if (threadIdx.x < WORKERS + 32) produce(my, codes, rows, begin, end, first_row);
            if (gridDim.y > 1) {
                sync_cluster();
                sync_cluster();
            }
        }
    }
};

// Up to 64 rows times a matrix of 4-bit codes, on Hopper: part of four_bit.cu.
//
// A program multiplies 64 lines a group of four warps with up to TOKENS rows. A group more of
// warps brings codes, scales and rows, STEP blocks of 64 inputs at a time, to a ring of STAGES
// stages in shared memory: codes before the kernel ahead has ended, rows behind it.
//
// Of a block of 64 inputs lane 4 g + t looks up bytes 8 t … 8 t + 7 of its lines, which are pairs
// 8 t + 2 s + h of inputs (s: product of four, h: half of it). The unit numbers a lane's pair of
// product s and half h as 8 s + 4 h + t. So a row's block is laid out with
//
//     pair 8 t + 2 s + h of memory    at    piece 2 s + h, word t    (pieces of 16 bytes)
//
// While the unit multiplies a block, the next one is looked up. The sums of each are multiplied
// with scales and added. The programs of a cluster, which share the inputs of the same lines,
// then read each other's sums.

template <int TOKENS, int GROUPS, int STEP, int STAGES>
struct Wide {
    static constexpr int WORKERS = 128 * GROUPS, THREADS = WORKERS + 128;
    static constexpr int LINES = 64 * GROUPS, LINE_BYTES = 32 * STEP, SUMS = TOKENS / 2;
    static constexpr uint32 CODE_BYTES = LINES * LINE_BYTES, BLOCK_BYTES = TOKENS * 128;
    static constexpr uint32 STAGE_BYTES = CODE_BYTES + STEP * BLOCK_BYTES;
    static constexpr uint32 SCALE_BYTES = LINES * STEP * 4;
    static constexpr uint32 RING = TABLE_BYTES, SCALES = RING + STAGES * STAGE_BYTES;
    static constexpr uint32 FULL = SCALES + STAGES * SCALE_BYTES, EMPTY = FULL + 8 * STAGES;
    static constexpr int WIDTH = LINES + 4;  // floats of a row's sums

    // Which of 8 lines the lanes of g take: so that they read different banks.
    static DEVICE int place_of(int g) {
        return STEP == 4 ? (g & 3) * 2 + (g >> 2) : (g & 1) | (g & 2) << 1 | (g & 4) >> 1;
    }

    // How the tensor map swizzles a line's 16-byte pieces.
    static DEVICE int swizzle_of(int line) { return STEP == 4 ? line & 7 : line >> 1 & 3; }

    // Gated, half of the groups have gate's lines, half up's.
    static DEVICE int first_line(const Arguments &my, int group) {
        if (!my.gated) return blockIdx.x * LINES + group * 64;
        if (group < GROUPS / 2) return blockIdx.x * (LINES / 2) + group * 64;
        return my.num_outputs + blockIdx.x * (LINES / 2) + (group - GROUPS / 2) * 64;
    }

    static DEVICE void load_weights(const Arguments &my, const Map &codes, int slot, int step) {
        int thread = threadIdx.x - WORKERS, num_blocks = my.num_inputs >> 6;
        if (thread == 0) {
            arrive_expecting(FULL + 8 * slot, CODE_BYTES);
#pragma unroll
            for (int group = 0; group < GROUPS; group++)
                copy_box(RING + slot * STAGE_BYTES + group * 64 * LINE_BYTES, codes,
                         step * LINE_BYTES, first_line(my, group), FULL + 8 * slot);
        }
        int num_lines = my.gated ? 2 * my.num_outputs : my.num_outputs;
        for (int local = thread; local < LINES; local += 128) {
            int line = clamp_below(first_line(my, local >> 6) + (local & 63), num_lines);
            const float *from = my.absmax + (uint64)line * num_blocks + step * STEP;
            uint32 to = SCALES + slot * SCALE_BYTES + local * STEP * 4;
            if (num_blocks % STEP == 0) {
                copy_async<STEP * 4>(to, from);
            } else {
#pragma unroll
                for (int block = 0; block < STEP; block++)
                    if (step * STEP + block < num_blocks)
                        copy_async<4>(to + block * 4, from + block);
            }
        }
    }

    static DEVICE void load_rows(const Arguments &my, int slot, int step, int begin, int num_rows) {
        int lane = threadIdx.x & 31, first = threadIdx.x >> 5 & 3, num_blocks = my.num_inputs >> 6;
        int piece = lane & 7, word = lane >> 3;
        uint32 to = RING + slot * STAGE_BYTES + CODE_BYTES + word * 4;
        const uint16 *from = my.rows + (uint64)(begin + first) * my.num_inputs
            + step * STEP * 64 + lane * 2;
        for (int row = first; row < num_rows; row += 4) {
            uint32 at = to + row * 128 + (piece ^ (row & 7)) * 16;
#pragma unroll
            for (int block = 0; block < STEP; block++)
                if (step * STEP + block < num_blocks)
                    copy_async<4>(at + block * BLOCK_BYTES, from + block * 64);
            from += 4 * my.num_inputs;
        }
    }

    static DEVICE void produce(const Arguments &my, const Map &codes, int begin, int end,
                               int first_row, int num_rows) {
        int ahead = end - begin < STAGES ? end - begin : STAGES;
        for (int i = 0; i < ahead; i++) load_weights(my, codes, i, begin + i);
        wait_for_previous();
        int slot = 0, turn = 0;
        for (int step = begin; step < end; step++) {
            if (step >= begin + STAGES) {
                wait_barrier(EMPTY + 8 * slot, (turn - 1) & 1);
                load_weights(my, codes, slot, step);
            }
            load_rows(my, slot, step, first_row, num_rows);
            arrive_after_copies(FULL + 8 * slot);
            if (++slot == STAGES) slot = 0, turn++;
        }
    }

    // Looks up a block's operands: [product][register of it].
    static DEVICE void look_up_block(uint32 (&a)[4][4], float (&scales)[2], uint32 codes,
                                     uint32 scales_at, uint32 lane_at) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            Two words = shared<Two>(codes + half * 8 * LINE_BYTES);
            scales[half] = shared<float>(scales_at + half * 8 * STEP * 4);
            a[0][half] = look_up<0>(words.x, lane_at);
            a[0][2 + half] = look_up<1>(words.x, lane_at);
            a[1][half] = look_up<2>(words.x, lane_at);
            a[1][2 + half] = look_up<3>(words.x, lane_at);
            a[2][half] = look_up<0>(words.y, lane_at);
            a[2][2 + half] = look_up<1>(words.y, lane_at);
            a[3][half] = look_up<2>(words.y, lane_at);
            a[3][2 + half] = look_up<3>(words.y, lane_at);
        }
    }

    static DEVICE void begin_block(float (&sums)[SUMS], const uint32 (&a)[4][4], uint32 rows) {
        uint64 described = describe_columns(rows);
        begin_group();
#pragma unroll
        for (int s = 0; s < 4; s++) multiply_group(sums, a[s], described + 2 * s, s != 0);
        commit_group();
    }

    static DEVICE void end_block(float (&sums)[SUMS], uint32 (&a)[4][4]) {
        wait_group();
#pragma unroll
        for (int i = 0; i < SUMS; i++) keep(sums[i]);
#pragma unroll
        for (int i = 0; i < 16; i++) keep(a[i >> 2][i & 3]);
    }

    static DEVICE void consume(const Arguments &my, float (&total)[SUMS], int begin, int end) {
        int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, t = lane & 3;
        int own_line = warp * 16 + place_of(lane >> 2), num_blocks = my.num_inputs >> 6;
        int own_piece = (t >> 1) ^ swizzle_of(own_line);
        uint32 own_codes = own_line * LINE_BYTES + own_piece * 16 + (t & 1) * 8;
        float sums[SUMS] = {};
        int slot = 0;
        uint32 parity = 0;
        for (int step = begin; step < end; step++) {
            wait_barrier(FULL + 8 * slot, parity);
            show_to_matrix_unit();
            uint32 codes = RING + slot * STAGE_BYTES + own_codes;
            uint32 scales_at = SCALES + slot * SCALE_BYTES + own_line * STEP * 4;
            uint32 rows = RING + slot * STAGE_BYTES + CODE_BYTES;
            uint32 a[2][4][4];
            float scales[2][2];
            look_up_block(a[0], scales[0], codes, scales_at, lane * 4);
            begin_block(sums, a[0], rows);
#pragma unroll
            for (int block = 0; block < STEP; block++) {
                bool more = block + 1 < STEP && step * STEP + block + 1 < num_blocks;
                int now = block & 1, next = (block + 1) & 1;
                if (more)
                    look_up_block(a[next], scales[next], codes ^ ((block + 1) * 32),
                                  scales_at + (block + 1) * 4, lane * 4);
                end_block(sums, a[now]);
#pragma unroll
                for (int i = 0; i < SUMS; i++) total[i] += scales[now][i >> 1 & 1] * sums[i];
                if (!more) break;
                begin_block(sums, a[next], rows + (block + 1) * BLOCK_BYTES);
            }
            sync_warp();
            if (lane == 0) arrive(EMPTY + 8 * slot);
            if (++slot == STAGES) slot = 0, parity ^= 1;
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
        consume(my, total, begin, end);
        wait_for_previous();
        sync_some(WORKERS);
        // The sums take the ring's place, float32 [TOKENS][WIDTH].
        int line = (threadIdx.x >> 5) * 16 + place_of(lane >> 2);
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

    // A grid of tiles, programs of a cluster, and TOKENS rows each.
    static DEVICE void multiply(const Arguments &my, const Map &codes) {
        let_next_start();
        int num_steps = ((my.num_inputs >> 6) + STEP - 1) / STEP;
        int begin = num_steps * blockIdx.y / gridDim.y;
        int end = num_steps * (blockIdx.y + 1) / gridDim.y;
        int first_row = blockIdx.z * TOKENS;
        int num_rows = my.num_rows - first_row < TOKENS ? my.num_rows - first_row : TOKENS;
        if (threadIdx.x == WORKERS) {
            for (int i = 0; i < STAGES; i++) {
                begin_barrier(FULL + 8 * i, 129);  // those who copy, and the announcement
                begin_barrier(EMPTY + 8 * i, WORKERS / 32);
            }
            show_barriers();
        }
        sync_block();
        // Many rows are many sums: who has them gets registers from who brings them.
        if (threadIdx.x < WORKERS) {
            if constexpr (TOKENS >= 64) more_registers<GROUPS == 4 ? 112 : 232>();
            work(my, begin, end, first_row, num_rows);
        } else {
            if constexpr (TOKENS >= 64) fewer_registers<GROUPS == 4 ? 24 : 40>();
            produce(my, codes, begin, end, first_row, num_rows);
            if (gridDim.y > 1) {
                sync_cluster();
                sync_cluster();
            }
        }
    }
};

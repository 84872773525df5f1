// What the hardware does, under the names by which kernels call it.
//
// Shared memory is addressed by bytes from the beginning of what a launch asked for.

typedef unsigned char uint8;
typedef unsigned short uint16;
typedef unsigned int uint32;
typedef unsigned long long uint64;

struct alignas(8) Two { uint32 x, y; };
struct alignas(16) Four { uint32 x, y, z, w; };
struct alignas(16) Floats { float x, y, z, w; };

#define DEVICE __device__ __forceinline__
#define KERNEL(threads, programs) extern "C" __global__ void __launch_bounds__(threads, programs)

// ---------------------------------------------------------------------------- memory

extern __shared__ __align__(1024) uint8 dynamic_shared[];

template <class T>
DEVICE T &shared(uint32 at) { return *(T *)(dynamic_shared + at); }

DEVICE uint32 shared_address(uint32 at) {
    return (uint32)__cvta_generic_to_shared(dynamic_shared + at);
}

// Loads of what is read once.
DEVICE uint32 stream_load(const void *from) {
    uint32 v;
    asm volatile("ld.global.nc.u32 %0, [%1];" : "=r"(v) : "l"(from));
    return v;
}
DEVICE Two stream_load_two(const void *from) {
    Two v;
    asm volatile("ld.global.nc.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(from));
    return v;
}
DEVICE Four stream_load_four(const void *from) {
    Four v;
    asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(from));
    return v;
}

// Copies to shared memory; there when a barrier says so.
template <int BYTES>
DEVICE void copy_async(uint32 to, const void *from) {
    if constexpr (BYTES == 16) {
        asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;"
                     :: "r"(shared_address(to)), "l"(from) : "memory");
    } else {
        asm volatile("cp.async.ca.shared.global [%0], [%1], %2;"
                     :: "r"(shared_address(to)), "l"(from), "n"(BYTES) : "memory");
    }
}

// Copies 4 bytes, or zeros if there are none.
DEVICE void copy_async_or_zero(uint32 to, const void *from, bool there) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;"
                 :: "r"(shared_address(to)), "l"(from), "r"(there ? 4 : 0) : "memory");
}

// Loads from an address of shared memory that a register holds: in this order,
DEVICE Four load_four(uint32 address) {
    Four v;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(address));
    return v;
}
DEVICE float load_float(uint32 address) {
    float v;
    asm volatile("ld.shared.f32 %0, [%1];" : "=f"(v) : "r"(address));
    return v;
}
// and in any, of what does not change.
DEVICE uint32 load_value(uint32 address) {
    uint32 v;
    asm("ld.shared.u32 %0, [%1];" : "=r"(v) : "r"(address));
    return v;
}

// ---------------------------------------------------------------------------- numbers

DEVICE uint32 byte_picker(int byte) { return 0x4440 | byte; }
DEVICE uint32 pick_byte(uint32 word, uint32 picker) {
    uint32 v;
    asm("prmt.b32 %0, %1, 0, %2;" : "=r"(v) : "r"(word), "r"(picker));
    return v;
}

#ifdef HALF
#define MMA_TYPES "f16.f16"
DEVICE uint32 pack(float first, float second) {
    uint32 v;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(v) : "f"(second), "f"(first));
    return v;
}
DEVICE float widen(uint16 v) {
    float f;
    asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(v));
    return f;
}
#else
#define MMA_TYPES "bf16.bf16"
DEVICE uint32 pack(float first, float second) {
    uint32 v;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(v) : "f"(second), "f"(first));
    return v;
}
DEVICE float widen(uint16 v) { return __uint_as_float((uint32)v << 16); }
#endif
DEVICE float as_float(uint32 v) { return __uint_as_float(v); }
DEVICE float reciprocal_root(float v) { return rsqrtf(v); }
DEVICE float exponential(float v) { return __expf(v); }

// ---------------------------------------------------------------------------- threads and kernels

DEVICE float exchange(float v, int with) { return __shfl_xor_sync(~0u, v, with); }
DEVICE uint32 broadcast(uint32 v, int from) { return __shfl_sync(~0u, v, from); }
DEVICE void sync_warp() { __syncwarp(); }
DEVICE void sync_block() { __syncthreads(); }
// Of the first threads of a program.
DEVICE void sync_some(int threads) { asm volatile("bar.sync 1, %0;" :: "r"(threads) : "memory"); }

// See overlap.py.
DEVICE void let_next_start() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
DEVICE void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// ---------------------------------------------------------------------------- the matrix unit
//
// Lane 4 g + t of a warp holds, of 16 lines by 16 inputs times 16 inputs by 8 columns:
//
//     a[0]  line g,     inputs 2 t, 2 t + 1        a[1]  line g + 8, the same
//     a[2]  line g,     inputs 2 t + 8, 2 t + 9    a[3]  line g + 8, the same
//     b0    column g,   inputs 2 t, 2 t + 1        b1    column g, inputs 2 t + 8, 2 t + 9
//     sums  line g: columns 2 t, 2 t + 1; line g + 8: the same

DEVICE void multiply_add(float (&sums)[4], const uint32 (&a)[4], uint32 b0, uint32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32." MMA_TYPES ".f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// ---------------------------------------------------------------------------- Hopper's own

// Programs of a cluster.
DEVICE void sync_cluster() {
    asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
}
DEVICE Floats cluster_load_four(uint32 at, uint32 rank) {
    Floats v;
    uint32 there;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;"
                 : "=r"(there) : "r"(shared_address(at)), "r"(rank));
    asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "r"(there));
    return v;
}

// Registers that threads give to others of their program.
template <int COUNT>
DEVICE void more_registers() { asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" :: "n"(COUNT)); }
template <int COUNT>
DEVICE void fewer_registers() { asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" :: "n"(COUNT)); }

// A barrier in shared memory: passed when all have arrived and all bytes announced are there.
DEVICE void begin_barrier(uint32 at, int count) {
    asm volatile("mbarrier.init.shared.b64 [%0], %1;"
                 :: "r"(shared_address(at)), "r"(count) : "memory");
}
DEVICE void show_barriers() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
DEVICE void arrive(uint32 at) {
    asm volatile("{\n.reg .b64 t;\nmbarrier.arrive.shared.b64 t, [%0];\n}"
                 :: "r"(shared_address(at)) : "memory");
}
DEVICE void arrive_expecting(uint32 at, int bytes) {
    asm volatile("{\n.reg .b64 t;\nmbarrier.arrive.expect_tx.shared.b64 t, [%0], %1;\n}"
                 :: "r"(shared_address(at)), "r"(bytes) : "memory");
}
// When this thread's copies until now are there.
DEVICE void arrive_after_copies(uint32 at) {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];"
                 :: "r"(shared_address(at)) : "memory");
}
DEVICE void wait_barrier(uint32 at, uint32 parity) {
    asm volatile("{\n.reg .pred p;\nAGAIN:\n"
                 "mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n"
                 "@p bra DONE;\nbra AGAIN;\nDONE:\n}"
                 :: "r"(shared_address(at)), "r"(parity) : "memory");
}

// A tensor map, and the copy of a box of it to shared memory; zeros where it ends.
struct alignas(64) Map { uint64 words[16]; };
#define MAP const __grid_constant__ Map
DEVICE void prefetch_map(const Map &map) {
    asm volatile("prefetch.tensormap [%0];" :: "l"(&map) : "memory");
}
DEVICE void copy_box(uint32 to, const Map &map, int column, int line, uint32 barrier) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes "
                 "[%0], [%1, {%2, %3}], [%4];"
                 :: "r"(shared_address(to)), "l"(&map), "r"(column), "r"(line),
                    "r"(shared_address(barrier)) : "memory");
}

// The matrix unit for four warps: 64 lines from registers, warp w's as above for lines 16 w …,
// times columns in shared memory, which sums hold eight by eight.
DEVICE void begin_group() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
DEVICE void commit_group() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int LEFT>
DEVICE void wait_groups() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" :: "n"(LEFT) : "memory");
}
// Until here a register is the matrix unit's.
DEVICE void keep(float &v) { asm volatile("" : "+f"(v) :: "memory"); }
DEVICE void keep(uint32 &v) { asm volatile("" : "+r"(v) :: "memory"); }

// Columns of 64 inputs, 128 bytes each, whose 16-byte pieces are swizzled by column % 8, have a
// number for a name: one more for each piece further on.
DEVICE uint32 name_columns(uint32 address) { return address >> 4 | 1 << 16; }
DEVICE uint64 describe_columns(uint32 name) {
    return (uint64)name | (uint64)(1024 >> 4 | 1 << 30) << 32;
}

#define SUMS_4(i) "+f"(sums[i]), "+f"(sums[i + 1]), "+f"(sums[i + 2]), "+f"(sums[i + 3])
#define SUMS_8(i) SUMS_4(i), SUMS_4(i + 4)
#define SUMS_16(i) SUMS_8(i), SUMS_8(i + 8)
#define SUMS_32(i) SUMS_16(i), SUMS_16(i + 16)
#define SUMS_64(i) SUMS_32(i), SUMS_32(i + 32)
#define NAMES_4 "%0, %1, %2, %3"
#define NAMES_8 NAMES_4 ", %4, %5, %6, %7"
#define NAMES_16 NAMES_8 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define NAMES_32 NAMES_16 ", %16, %17, %18, %19, %20, %21, %22, %23" \
    ", %24, %25, %26, %27, %28, %29, %30, %31"
#define NAMES_64 NAMES_32 ", %32, %33, %34, %35, %36, %37, %38, %39" \
    ", %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55" \
    ", %56, %57, %58, %59, %60, %61, %62, %63"

// `add` is 0 for sums that begin. The last five arguments are count, count + 1, …
#define MULTIPLY_GROUP(columns, count, a0, a1, a2, a3, rows_name, add_name)                     \
    DEVICE void multiply_group(float (&sums)[count], const uint32 (&a)[4], uint64 rows, int add) { \
        asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #add_name ", 0;\n"                    \
                     "wgmma.mma_async.sync.aligned.m64n" #columns "k16.f32." MMA_TYPES " "      \
                     "{" NAMES_##count "}, {%" #a0 ", %" #a1 ", %" #a2 ", %" #a3 "}, "          \
                     "%" #rows_name ", p, 1, 1, 0;\n}"                                          \
                     : SUMS_##count(0)                                                          \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(rows), "r"(add));        \
    }
MULTIPLY_GROUP(8, 4, 4, 5, 6, 7, 8, 9)
MULTIPLY_GROUP(16, 8, 8, 9, 10, 11, 12, 13)
MULTIPLY_GROUP(32, 16, 16, 17, 18, 19, 20, 21)
MULTIPLY_GROUP(64, 32, 32, 33, 34, 35, 36, 37)
MULTIPLY_GROUP(128, 64, 64, 65, 66, 67, 68, 69)

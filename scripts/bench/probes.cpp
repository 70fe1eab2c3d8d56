// What this machine's memory and arithmetic give at most: the limits that benchmarks are held to.
//
// Compiled on the fly for the CPU it runs on; no part of the library. Every probe is one pass over
// `num_threads` threads that start together; the caller takes the best, or the median, of several.
#include <immintrin.h>
#include <pthread.h>
#include <sched.h>
#include <stdint.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <functional>
#include <thread>
#include <vector>

namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#else
constexpr int kVectorBytes = 32;
#endif
constexpr int kLanes = kVectorBytes / 4;
constexpr int kRegisters = 10;  // enough to hide the latency of an FMA, few enough to stay in registers
typedef int32_t Ints __attribute__((vector_size(kVectorBytes)));

std::atomic<int64_t> g_sink{0};

double now_s() {
  using Clock = std::chrono::steady_clock;
  return std::chrono::duration<double>(Clock::now().time_since_epoch()).count();
}

// Seconds from the moment that all threads are there until the last of them is done.
double run_together(int num_threads, const std::function<void(int)>& work) {
  std::atomic<int> num_ready{0};
  std::atomic<bool> is_started{false};
  std::vector<std::thread> threads;
  for (int thread = 1; thread < num_threads; ++thread) {
    threads.emplace_back([&, thread] {
      ++num_ready;
      while (!is_started.load(std::memory_order_acquire)) sched_yield();
      work(thread);
    });
  }
  while (num_ready.load() < num_threads - 1) sched_yield();
  const double began = now_s();
  is_started.store(true, std::memory_order_release);
  work(0);
  for (std::thread& thread : threads) thread.join();
  return now_s() - began;
}

// Reads num_bytes as num_streams sequential streams side by side, prefetching ahead of each.
template <int num_streams, int prefetch_bytes>
int64_t read_streams(const char* data, int64_t num_bytes) {
  constexpr int kLineVectors = 64 / kVectorBytes;
  constexpr int kUnroll = 4 / num_streams > 0 ? 4 / num_streams : 1;
  const int64_t stride = num_bytes / num_streams / (64 * kUnroll) * (64 * kUnroll);
  Ints sums[num_streams * kUnroll * kLineVectors] = {};
  for (int64_t at = 0; at < stride; at += 64 * kUnroll) {
    for (int stream = 0; stream < num_streams; ++stream) {
      const char* from = data + stream * stride + at;
      for (int line = 0; line < kUnroll; ++line) {
        if (prefetch_bytes) _mm_prefetch(from + 64 * line + prefetch_bytes, _MM_HINT_T0);
        for (int part = 0; part < kLineVectors; ++part) {
          const int sum = (stream * kUnroll + line) * kLineVectors + part;
          sums[sum] ^= *reinterpret_cast<const Ints*>(from + 64 * line + kVectorBytes * part);
        }
      }
    }
  }
  int64_t total = 0;
  for (const Ints& sum : sums) total += sum[0];
  return total;
}

using Reader = int64_t (*)(const char*, int64_t);
struct Way {
  const char* name;
  Reader read;
};
// Whether prefetching helps depends on the CPU: the callers choose by measuring.
const Way kWays[] = {{"1 stream", read_streams<1, 0>},
                     {"2 streams", read_streams<2, 0>},
                     {"4 streams", read_streams<4, 0>},
                     {"1 stream, 4 KB ahead", read_streams<1, 4096>},
                     {"2 streams, 2 KB ahead", read_streams<2, 2048>},
                     {"4 streams, 1 KB ahead", read_streams<4, 1024>}};

// What is read: num_threads slices in huge pages, each first touched by its own thread.
struct Memory {
  void* mapping;
  int64_t mapped_bytes;
  const char* data;
  int64_t slice_bytes;
  int num_threads;
};

// Every kernel of arithmetic: operations done by one thread in `repeats` rounds.
double multiply_add_f32(int64_t repeats) {
#if defined(__AVX512F__)
  __m512 sums[kRegisters];
  for (int i = 0; i < kRegisters; ++i) sums[i] = _mm512_set1_ps(i);  // differ, so none is dropped
  const __m512 x = _mm512_set1_ps(0.5f);
#else
  __m256 sums[kRegisters];
  for (int i = 0; i < kRegisters; ++i) sums[i] = _mm256_set1_ps(i);
  const __m256 x = _mm256_set1_ps(0.5f);
#endif
  for (int64_t repeat = 0; repeat < repeats; ++repeat) {
    for (auto& sum : sums) {
#if defined(__AVX512F__)
      sum = _mm512_fmadd_ps(sum, x, x);
#else
      sum = _mm256_fmadd_ps(sum, x, x);
#endif
    }
  }
  float total = 0;
  for (const auto& sum : sums) total += sum[0];
  g_sink += static_cast<int64_t>(total);
  return 2.0 * kLanes * kRegisters * repeats;
}

#if defined(__AVX512BF16__)
double multiply_add_bf16(int64_t repeats) {
  __m512 sums[kRegisters];
  for (int i = 0; i < kRegisters; ++i) sums[i] = _mm512_set1_ps(i);
  const __m512bh x = reinterpret_cast<__m512bh>(_mm512_set1_epi32(0x3f803f80));
  for (int64_t repeat = 0; repeat < repeats; ++repeat) {
    for (__m512& sum : sums) sum = _mm512_dpbf16_ps(sum, x, x);
  }
  float total = 0;
  for (const __m512& sum : sums) total += sum[0];
  g_sink += static_cast<int64_t>(total);
  return 4.0 * 16 * kRegisters * repeats;
}
#endif

#if defined(__AMX_BF16__)
constexpr int kArchRequestPermission = 0x1023, kTileData = 18;

struct TileShapes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
} __attribute__((packed));

double multiply_add_tiles(int64_t repeats) {
  if (syscall(SYS_arch_prctl, kArchRequestPermission, kTileData) != 0) return 0;
  const TileShapes shapes;
  _tile_loadconfig(&shapes);
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  _tile_zero(4);
  _tile_zero(5);
  _tile_zero(6);
  _tile_zero(7);
  for (int64_t repeat = 0; repeat < repeats; ++repeat) {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_release();
  return 4.0 * 2 * 16 * 16 * 32 * repeats;
}
#endif

// Operations a second of one pass, some milliseconds.
double rate(double (*kernel)(int64_t), int num_threads) {
  constexpr int64_t kRepeats = 1 << 21;
  std::vector<double> done(num_threads);
  const double seconds =
      run_together(num_threads, [&](int thread) { done[thread] = kernel(kRepeats); });
  double total = 0;
  for (double operations : done) total += operations;
  return total / seconds;
}

}  // namespace

extern "C" {

// num_bytes of memory for probe_read; null: there is not so much.
Memory* probe_memory_new(int64_t num_bytes, int num_threads) {
  constexpr int64_t kHugePage = 2 << 20;
  const int64_t mapped_bytes = num_bytes + kHugePage;
  void* found = mmap(nullptr, mapped_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS,
                     -1, 0);
  if (found == MAP_FAILED) return nullptr;
  char* data = reinterpret_cast<char*>(
      (reinterpret_cast<uintptr_t>(found) + kHugePage - 1) / kHugePage * kHugePage);
  madvise(data, num_bytes, MADV_HUGEPAGE);
  const int64_t slice = num_bytes / num_threads / 4096 * 4096;
  run_together(num_threads, [&](int thread) {
    std::fill_n(data + thread * slice, slice, static_cast<char>(thread + 1));
  });
  return new Memory{found, mapped_bytes, data, slice, num_threads};
}

void probe_memory_delete(Memory* memory) {
  munmap(memory->mapping, memory->mapped_bytes);
  delete memory;
}

int probe_num_ways(void) { return sizeof(kWays) / sizeof(kWays[0]); }
const char* probe_way(int way) { return kWays[way].name; }

// Bytes a second of one pass that reads all of memory in that way.
double probe_read(const Memory* memory, int way) {
  const double seconds = run_together(memory->num_threads, [&](int thread) {
    g_sink += kWays[way].read(memory->data + thread * memory->slice_bytes, memory->slice_bytes);
  });
  return static_cast<double>(memory->slice_bytes) * memory->num_threads / seconds;
}

double probe_f32(int num_threads) { return rate(multiply_add_f32, num_threads); }

// Operations a second of products of bf16 pairs, or 0 where the CPU has none.
double probe_bf16(int num_threads) {
#if defined(__AVX512BF16__)
  return rate(multiply_add_bf16, num_threads);
#else
  return 0 * num_threads;
#endif
}

// The same of tiles (AMX).
double probe_tiles(int num_threads) {
#if defined(__AMX_BF16__)
  return rate(multiply_add_tiles, num_threads);
#else
  return 0 * num_threads;
#endif
}

int probe_vector_bytes(void) { return kVectorBytes; }
}

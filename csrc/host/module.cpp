// fastclip._host: what has nothing to do with tensors: the generators and the transform on given input, for tests and for
// whoever wants to check the stream; the discrete Gaussian; and what this processor is taken for.
#pragma GCC diagnostic ignored "-Wattributes"
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "../cpu/dispatch.h"
#include "../random/discrete_gaussian.h"
#include "../random/normals.h"
#include "../random/stream.h"

namespace py = pybind11;

namespace fastclip {
namespace {

using Words = py::array_t<int64_t, py::array::c_style>;

void need_words(const Words& words, ssize_t columns) {
  if (words.ndim() != 2 || words.shape(1) != columns)
    throw py::value_error("words must be int64 of shape [n, " + std::to_string(columns) + "]");
}

Words stream_words_of(const std::string& key, uint64_t nonce, uint64_t block, int64_t count) {
  if (key.size() != 32) throw py::value_error("key must be 32 bytes, got " + std::to_string(key.size()));
  if (count < 0) throw py::value_error("count must not be negative, got " + std::to_string(count));
  Stream stream;
  std::memcpy(stream.key, key.data(), 32);
  stream.nonce = nonce;
  Words out({static_cast<ssize_t>(count), ssize_t{8}});
  for (int64_t b = 0; b < count; ++b) {
    uint32_t words[16];
    const uint64_t number = block + b;
    stream_words(stream, static_cast<uint32_t>(number), static_cast<uint32_t>(number >> 32), words);
    for (int i = 0; i < 8; ++i) out.mutable_at(b, i) = words[2 * i] | uint64_t{words[2 * i + 1]} << 32;
  }
  return out;
}

py::tuple philox(std::array<uint32_t, 4> counter, uint32_t key0, uint32_t key1) {
  uint32_t words[4] = {counter[0], counter[1], counter[2], counter[3]};
  philox4x32(words, key0, key1);
  return py::make_tuple(words[0], words[1], words[2], words[3]);
}

void halves(const int64_t* words, uint32_t (&out)[16]) {
  for (int i = 0; i < 8; ++i) {
    out[2 * i] = static_cast<uint32_t>(words[i]);
    out[2 * i + 1] = static_cast<uint32_t>(static_cast<uint64_t>(words[i]) >> 32);
  }
}

FASTCLIP_INLINE void by_sixteen(const int64_t* words, double* out, int64_t blocks) {
  for (int64_t first = 0; first < blocks; first += 16) {
    const int64_t count = blocks - first < 16 ? blocks - first : 16;
    u32x16 lanes[16] = {};
    for (int64_t b = 0; b < count; ++b)
      for (int i = 0; i < 16; ++i)
        lanes[i][b] = static_cast<uint32_t>(static_cast<uint64_t>(words[8 * (first + b) + i / 2]) >> (i % 2 * 32));
    alignas(64) double z[128];
    normals(lanes, z);
    std::memcpy(out + 8 * first, z, 8 * count * sizeof(double));
  }
}

// In vectors, as the kernels on CPU do it, or one block at a time, as a GPU's threads do.
py::array_t<double> normals_of(const Words& words, bool vectors) {
  need_words(words, 8);
  py::array_t<double> out({words.shape(0), ssize_t{8}});
  const int64_t* from = words.data();
  double* to = out.mutable_data();
  const int64_t blocks = words.shape(0);
  if (vectors) {
    best([&]() FASTCLIP_LAMBDA { by_sixteen(from, to, blocks); });
    return out;
  }
  for (int64_t b = 0; b < blocks; ++b) {
    uint32_t block[16];
    halves(from + 8 * b, block);
    normals(block, to + 8 * b);
  }
  return out;
}

// out[i] is element first + i of the stream.
void discrete_gaussians(Words& out, uint64_t sigma, const py::bytes& key, uint64_t nonce, uint64_t first) {
  const std::string secret = key;
  if (secret.size() != 32) throw py::value_error("key must be 32 bytes, got " + std::to_string(secret.size()));
  if (sigma < 1 || sigma > kMostSigma)
    throw py::value_error("sigma must be a whole number in [1, 2^31], got " + std::to_string(sigma));
  if (out.ndim() != 1 || !out.writeable()) throw py::value_error("out must be int64 of shape [n]");
  const uint64_t count = out.shape(0);
  if (first >= kMostElements || count > kMostElements - first)
    throw py::value_error("elements must lie in [0, 2^48), got " + std::to_string(count) + " from " + std::to_string(first));
  int64_t* to = out.mutable_data();
  Stream stream;
  std::memcpy(stream.key, secret.data(), 32);
  stream.nonce = nonce;
  py::gil_scoped_release release;
  for (uint64_t i = 0; i < count; i += 16) {
    u32x16 halves[16];
    best([&]() FASTCLIP_LAMBDA {
      u32x16 low, high;
      for (int lane = 0; lane < 16; ++lane) {
        low[lane] = static_cast<uint32_t>(first + i + lane);
        high[lane] = static_cast<uint32_t>((first + i + lane) >> 32);
      }
      u32x16 start[16];
      chacha20_state(stream.key, stream.nonce, start);
      stream_words(stream, start, low, high, halves);
    });
    for (uint64_t lane = 0; lane < 16 && i + lane < count; ++lane) {
      uint64_t own[8];
      for (int w = 0; w < 8; ++w) own[w] = halves[2 * w][lane] | uint64_t{halves[2 * w + 1][lane]} << 32;
      ElementWords words(stream, first + i + lane, own);
      to[i + lane] = discrete_gaussian(words, sigma);
    }
  }
}

const char* cpu_capability() {
  const Capability found = capability();
  return found == Capability::kAvx512 ? "avx512" : found == Capability::kAvx2 ? "avx2" : "default";
}

}  // namespace
}  // namespace fastclip

PYBIND11_MODULE(_host, m) {
  m.doc() = "Generators and transform of the noise stream on given input, and what this processor is taken for.";
  m.def("words", &fastclip::stream_words_of, "Words of blocks of the stream, int64 [count, 8]; fastclip.random.Key.words.",
        py::arg("key"), py::arg("nonce"), py::arg("block"), py::arg("count"));
  m.def("philox4x32", &fastclip::philox, "Philox4x32-10 of a counter of four 32-bit words.", py::arg("counter"),
        py::arg("key0"), py::arg("key1"));
  m.def("normals", &fastclip::normals_of, "Normals of given words, int64 [n, 8] to fp64 [n, 8]; fastclip.random.normals.",
        py::arg("words"), py::arg("vectors") = true);
  m.def("discrete_gaussian", &fastclip::discrete_gaussians,
        "Fills out, int64 [n], with N_Z(0, sigma^2): elements first and on of the stream of (key, nonce).",
        py::arg("out").noconvert(), py::arg("sigma"), py::arg("key"), py::arg("nonce"), py::arg("first"));
  m.def("cpu_capability", &fastclip::cpu_capability, "The instruction set whose kernels run here.");
}

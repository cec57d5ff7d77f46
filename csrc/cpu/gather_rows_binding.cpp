// Python binding of the CPU kernel of `gather_rows`.
#include "gather_rows.h"
#include "bindings.h"

using namespace fastdiff;

namespace {

// Returns the first row with an index out of range, before anything is written, or -1.
int64_t gather_rows(int dtype, bool channels_last, Address x, Address extra, Address samples,
                    Address embeddings, Address places, Address inputs, Address emb, int64_t rows,
                    int64_t count, int64_t length, int64_t channels, int64_t more, int64_t space,
                    int64_t width) {
  const auto sample = pointer<const int64_t>(samples), place = pointer<const int64_t>(places);
  for (int64_t row = 0; row < rows; ++row)
    if (sample[row] < 0 || sample[row] >= count || place[row] < 0 || place[row] >= length)
      return row;
  run(GatherRows{Dtype(dtype), channels_last, pointer<const float>(x), pointer<const float>(extra),
                 sample, place, in(embeddings), out(inputs), out(emb), rows, channels, more, space,
                 width});
  return -1;
}

const Binding gather_rows_binding([](py::module_& m) {
  m.def("gather_rows", &gather_rows, Release());
});

}  // namespace

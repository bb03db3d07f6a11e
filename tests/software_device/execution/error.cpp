// The words of an error.
#include <cstdarg>
#include <cstdio>

#include "execution/state.hpp"

namespace soft {

// "kernel k, block (0, 0, 0), thread 33, line 7: ld.global.u32 %r1, [%rd2];"
std::string describe(const Warp& warp, const Inst& inst, int lane) {
  const Block& block = *warp.block;
  const u32 thread = warp.index * 32 + static_cast<u32>(lane), *size = block.l->block;
  char text[256];
  if (size[1] * size[2] == 1) {
    snprintf(text, sizeof text, ", block (%u, %u, %u), thread %u, line %u: ", block.ctaid[0], block.ctaid[1],
             block.ctaid[2], thread, inst.line);
  } else {
    snprintf(text, sizeof text, ", block (%u, %u, %u), thread (%u, %u, %u), line %u: ", block.ctaid[0], block.ctaid[1],
             block.ctaid[2], thread % size[0], thread / size[0] % size[1], thread / (size[0] * size[1]), inst.line);
  }
  // The implicit end of a kernel has no text.
  const bool has_text = &inst != &warp.f->code.back() && inst.text < warp.f->texts.size();
  const std::string source = source_line(*warp.f, inst);
  return "kernel " + warp.f->name + text + (has_text ? warp.f->texts[inst.text] : "the end of the kernel") +
         (source.empty() ? "" : ", " + source);
}

void fault(const Warp& warp, const Inst& inst, int lane, const char* format, ...) {
  char message[1024];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(message, sizeof message, format, arguments);
  va_end(arguments);
  throw std::runtime_error(std::string(message) + ": " + describe(warp, inst, lane));
}

}  // namespace soft

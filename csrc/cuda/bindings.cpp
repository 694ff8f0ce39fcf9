// The <op>_cuda functions, in one object: see module.cpp.
#include "cuda/bindings.h"

#include "apply_rope/apply_rope_cuda_bind.h"
#include "attention/attention_cuda_bind.h"
#include "cuda/launches.h"
#include "decode_attention/decode_attention_cuda_bind.h"
#include "divided_attention/divided_attention_cuda_bind.h"
#include "kv_append/kv_append_cuda_bind.h"
#include "qkv_prologue/qkv_prologue_cuda_bind.h"
#include "rearrange/rearrange_cuda_bind.h"

void vk::bind_cuda(py::module_& m) {
  bind_launches(m);
  apply_rope_cuda_bind::bind(m);
  attention_cuda_bind::bind(m);
  decode_attention_cuda_bind::bind(m);
  divided_attention_cuda_bind::bind(m);
  kv_append_cuda_bind::bind(m);
  qkv_prologue_cuda_bind::bind(m);
  rearrange_cuda_bind::bind(m);
}

"""Our kernels behind the hooks that other libraries have for them: opt-in, one call each, nothing on import.

| file                      | the hook                                                                      |
|---------------------------|-------------------------------------------------------------------------------|
| transformers_attention.py | transformers' AttentionInterface and its mask functions                       |
| sinks.py                  | attention sinks for it, from the attention op as it is                        |
| layers.py, kernelized.py  | `kernelize` of the package kernels, which transformers' `use_kernels` calls   |
| torch_flash.py            | torch.nn.attention.register_flash_attention_impl                              |
"""

# megatron_mm on NVIDIA's PyTorch image, which brings torch, TransformerEngine, flash-attn, apex and DALI.
#   docker build --build-arg BASE=nvcr.io/nvidia/pytorch:YY.MM-py3 -t megatron_mm . && enroot import -o megatron_mm.sqsh dockerd://megatron_mm
# Not built yet: the machine that this was written on has no Docker and cannot reach nvcr.io.
# YY.MM: the first image whose torch is that of requirements.txt.
ARG BASE
FROM ${BASE}

# A100, H100, B200: csrc/kernels is compiled for these; there is no GPU to ask during a build.
ENV TORCH_CUDA_ARCH_LIST="8.0;9.0;10.0"
WORKDIR /opt/megatron_mm
COPY requirements.txt requirements-dev.txt ./
# The image's own torch, torchvision, torchaudio and triton stay: those of PyPI lack what TransformerEngine was built against.
RUN grep -vE '^(torch|torchvision|torchaudio|triton|nvidia-)' requirements.txt > /tmp/requirements.txt \
 && pip install --no-cache-dir -r /tmp/requirements.txt -r requirements-dev.txt
COPY . .
RUN pip install --no-cache-dir --no-build-isolation --no-deps --editable .
# What needs no GPU and no several processes: the build fails where a test does.
RUN python -m pytest -q tests/unit tests/kernels -p no:cacheprovider

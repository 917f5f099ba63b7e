from setuptools import setup

setup(
    packages=["continual_mha", "continual_mha.triton_kernels"],
    package_dir={"continual_mha.triton_kernels": "triton_kernels"},
)

from setuptools import find_packages, setup

setup(
    name="autopar",
    version="0.1.0",
    description="Trains a PyTorch module written for one device on a whole cluster, by the plan expected to be fastest",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["autopar", "autopar.*"]),
    entry_points={"console_scripts": ["autopar=autopar.cli:main"]},
    install_requires=["torch>=2.11", "einops", "highspy", "numpy", "safetensors", "tqdm"],
    extras_require={
        "hf": ["transformers"],
        # scipy and expecttest: torch's own database of operator samples, which the sharding rules are tested against.
        "test": ["expecttest", "hypothesis", "pytest", "pytest-xdist", "ruff", "scipy", "transformers"],
    },
)

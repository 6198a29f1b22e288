# cuda-core finds its classes by rewriting __path__ at import, which a type checker can't follow: here they are.
from cuda.core.cu13._device import Device as Device
from cuda.core.cu13._launch_config import LaunchConfig as LaunchConfig
from cuda.core.cu13._launcher import launch as launch
from cuda.core.cu13._module import Kernel as Kernel
from cuda.core.cu13._module import ObjectCode as ObjectCode
from cuda.core.cu13._program import Program as Program
from cuda.core.cu13._program import ProgramOptions as ProgramOptions
from cuda.core.cu13._stream import Stream as Stream

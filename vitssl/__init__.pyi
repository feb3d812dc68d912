from vitssl.data.modalities import normalise_sensors as normalise_sensors
from vitssl.run.inference import Features as Features
from vitssl.run.inference import load as load
from vitssl.tools.own import train as train

__version__: str

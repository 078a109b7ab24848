"""The tests, which import torchvision as jobs do, before any of them imports it by itself."""

from mgpu_ddp.models.lazy_dynamo import import_torchvision

import_torchvision()

# SPDX-License-Identifier: Apache-2.0
"""InternVideo2.5 on lrc_kernels. Import a part by its module, e.g. `from lrc_model.vision import VisionEncoder`."""

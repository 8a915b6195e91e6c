"""What a pool runs with: a `KVCachePool` resolved, profiles and defaults filled in, read from files, compared.

Reads nothing but the file that it is given, and imports neither torch nor numpy.
"""

from kvpool.config.changes import Change, changes, with_live_changes
from kvpool.config.directory import default_directory
from kvpool.config.load import dump_config, load_config, load_pool, parse_config
from kvpool.config.messages import InvalidFieldsError
from kvpool.config.resolve import Setting, effective_settings, runtime_config
from kvpool.config.runtime import (
    CompressionConfig,
    DatabaseConfig,
    DragonflyConfig,
    GpuConfig,
    ModelConfig,
    PolicyConfig,
    PostgresConfig,
    PrefetchConfig,
    PricesConfig,
    QdrantConfig,
    QuotaConfig,
    RamConfig,
    RuntimeConfig,
    SharingConfig,
    SsdConfig,
    TelemetryConfig,
)

__all__ = [
    "Change",
    "CompressionConfig",
    "DatabaseConfig",
    "DragonflyConfig",
    "GpuConfig",
    "InvalidFieldsError",
    "ModelConfig",
    "PolicyConfig",
    "PostgresConfig",
    "PrefetchConfig",
    "PricesConfig",
    "QdrantConfig",
    "QuotaConfig",
    "RamConfig",
    "RuntimeConfig",
    "Setting",
    "SharingConfig",
    "SsdConfig",
    "TelemetryConfig",
    "changes",
    "default_directory",
    "dump_config",
    "effective_settings",
    "load_config",
    "load_pool",
    "parse_config",
    "runtime_config",
    "with_live_changes",
]

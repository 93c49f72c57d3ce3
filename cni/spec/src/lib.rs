//! What CNI 1.1.0 says on the wire, from the plugin's side: call, configuration, results, errors, versions.
#![forbid(unsafe_code)]

mod args;
mod call;
mod config;
mod error;
mod mac;
mod range;
mod result;
mod runtime;
mod version;

pub use args::Args;
pub use call::{Call, CallError, Command};
pub use config::{Attachment, Config, ConfigError, Fabric};
pub use error::{Code, ErrorReport};
pub use mac::{HardwareAddress, NotAnAddress};
pub use range::{Ipam, Range};
pub use result::{AddResult, Interface, IpConfig, Route, VersionResult};
pub use runtime::{Bandwidth, Dns, PortMapping, Protocol, Rate, RuntimeConfig};
pub use version::{SUPPORTED, UnknownVersion, Version};

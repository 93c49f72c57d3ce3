//! What CNI 1.1.0 says on the wire, from the plugin's side: call, configuration, results, errors, versions.
#![forbid(unsafe_code)]

mod call;
mod config;
mod error;
mod range;
mod result;
mod version;

pub use call::{Call, CallError, Command};
pub use config::{Attachment, Config, ConfigError, RuntimeConfig};
pub use error::{Code, ErrorReport};
pub use range::{Ipam, Range};
pub use result::{AddResult, Interface, IpConfig, Route, VersionResult};
pub use version::{SUPPORTED, UnknownVersion, Version};

//! Why a call failed, and the number that CNI has for it.

use std::io;
use std::path::PathBuf;

use weft_cni_netlink::Class;
use weft_cni_spec::{CallError, Code, ConfigError, Version};

/// Why a call failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum PluginError {
    /// The environment can't be used.
    #[error(transparent)]
    Call(#[from] CallError),
    /// The configuration can't be used.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// Standard input can't be read.
    #[error("cannot read the network configuration")]
    Input {
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The command isn't one of the configuration's version.
    #[error("config version {version} does not allow {command}")]
    NotInVersion {
        /// The command.
        command: &'static str,
        /// The configuration's version.
        version: Version,
    },
    /// The command needs a field that is optional otherwise.
    #[error("invalid network config: {0} is missing")]
    Missing(&'static str),
    /// The pod's namespace can't be opened.
    #[error("failed to open netns {path:?}")]
    Netns {
        /// Its path.
        path: PathBuf,
        /// Why.
        #[source]
        source: weft_cni_netlink::Error,
    },
    /// No address can be had, or none given back.
    #[error("failed to manage the pod's address")]
    Address(#[from] weft_cni_ipam::Error),
    /// The kernel refused.
    #[error("failed to set up the pod's network")]
    Kernel(#[from] weft_cni_netlink::Error),
    /// A device doesn't come up.
    #[error("the device {0} does not come up")]
    NotRunning(String),
    /// A port of the node leads to another pod.
    #[error("host ports {0}: at least one leads to another container")]
    PortTaken(String),
    /// The kernel can't bound traffic.
    #[error("runtimeConfig.bandwidth: this kernel has no token bucket (tbf)")]
    NoShaping(#[source] weft_cni_netlink::Error),
    /// What the container receives is bounded on the host, where its interface has no end.
    #[error("runtimeConfig.bandwidth: the container's interface is no veth of this host")]
    NoHostEnd,
    /// Another plugin was called first, and the configuration says that this one is the first.
    #[error("prevResult: set, although bridge and ipam say that this plugin makes the interface")]
    NotFirst,
    /// What only the plugin that makes the interface can give.
    #[error("runtimeConfig: {0} can't be given behind another plugin")]
    NotChained(&'static str),
    /// CHECK found something else.
    #[error("the network is not as ADD left it: {0}")]
    Check(String),
    /// STATUS: no ADD can be served.
    #[error("no pod can be attached")]
    Unavailable {
        /// Why.
        #[source]
        source: Box<PluginError>,
    },
    /// ADD failed, and what it had done could not all be undone.
    #[error("{failed}; and undoing it failed")]
    Undo {
        /// Why ADD failed.
        failed: Box<PluginError>,
        /// Why it couldn't be undone.
        #[source]
        source: Box<PluginError>,
    },
}

impl PluginError {
    /// CNI's number for it.
    pub(crate) fn code(&self) -> Code {
        match self {
            Self::Call(_) => Code::InvalidEnvironment,
            Self::Config(error) => error.code(),
            Self::Input { .. } => Code::Io,
            Self::NotInVersion { .. } => Code::IncompatibleVersion,
            Self::Missing(_) => Code::InvalidConfig,
            Self::Netns { .. } => Code::UnknownContainer,
            Self::Address(weft_cni_ipam::Error::Exhausted) => Code::TryAgain,
            Self::Address(
                weft_cni_ipam::Error::NotInPool(_)
                | weft_cni_ipam::Error::Taken(_)
                | weft_cni_ipam::Error::Second(_),
            ) => Code::InvalidConfig,
            Self::Address(weft_cni_ipam::Error::Io { .. }) => Code::Io,
            Self::Kernel(error) => match error.class() {
                Class::Retry => Code::TryAgain,
                Class::NotFound | Class::Exists | Class::Denied | Class::Fatal => Code::Kernel,
            },
            Self::NotRunning(_) | Self::PortTaken(_) => Code::TryAgain,
            Self::NoShaping(_) | Self::NoHostEnd | Self::NotChained(_) => Code::UnsupportedField,
            Self::NotFirst => Code::InvalidConfig,
            Self::Check(_) => Code::CheckFailed,
            Self::Unavailable { .. } => Code::NotAvailable,
            Self::Undo { failed, .. } => failed.code(),
        }
    }
}

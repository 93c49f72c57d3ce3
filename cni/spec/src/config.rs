//! The network's configuration, as a plugin gets it on standard input.

use std::net::Ipv4Addr;
use std::path::PathBuf;

use ipnetwork::{IpNetwork, Ipv4Network};
use serde::Deserialize;
use serde_json::Value;

use crate::call::is_identifier;
use crate::{Code, Version};

/// A configuration that has been checked.
#[derive(Clone, Debug)]
pub struct Config {
    /// The version that the caller speaks, and wants the result in.
    pub version: Version,
    /// The network's name.
    pub name: String,
    /// The bridge that pods are ports of.
    pub bridge: String,
    /// Largest packet in bytes.
    pub mtu_bytes: u32,
    /// Where addresses come from.
    pub ipam: Ipam,
    /// Where leases are kept.
    pub state_dir: PathBuf,
    /// What the caller adds for this container.
    pub runtime: RuntimeConfig,
    /// What ADD answered, for CHECK.
    pub prev_result: Option<Value>,
    /// GC: the attachments that are still valid.
    pub valid_attachments: Option<Vec<Attachment>>,
}

/// Where addresses come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ipam {
    /// The pods' subnet.
    pub subnet: Ipv4Network,
    /// The bridge's address in it.
    pub gateway: Ipv4Addr,
}

/// What the caller adds for one container (capability `ips`).
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
pub struct RuntimeConfig {
    /// The addresses that the container must get; at most one of IPv4 is served.
    #[serde(default)]
    pub ips: Vec<IpNetwork>,
}

/// A container's interface.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Deserialize)]
pub struct Attachment {
    /// The container's id.
    #[serde(rename = "containerID")]
    pub container: String,
    /// The interface's name.
    pub ifname: String,
}

/// Why a configuration can't be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// Not JSON, or of another form.
    #[error("failed to load netconf")]
    Decode(#[source] serde_json::Error),
    /// A version that isn't spoken.
    #[error("incompatible CNI versions: config is {0:?}, plugin supports {1:?}")]
    Version(String, Vec<&'static str>),
    /// A field is missing or can't be carried out.
    #[error("invalid network config: {field}: {reason}")]
    Invalid {
        /// Which.
        field: &'static str,
        /// Why.
        reason: &'static str,
    },
}

impl ConfigError {
    /// The reason's number.
    pub fn code(&self) -> Code {
        match self {
            Self::Decode(_) => Code::Decode,
            Self::Version(..) => Code::IncompatibleVersion,
            Self::Invalid { .. } => Code::InvalidConfig,
        }
    }
}

#[derive(Deserialize)]
struct Head {
    #[serde(rename = "cniVersion", default)]
    version: Option<String>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Raw {
    name: Option<String>,
    bridge: Option<String>,
    mtu: Option<u32>,
    ipam: Option<RawIpam>,
    state_dir: Option<PathBuf>,
    #[serde(default)]
    runtime_config: RuntimeConfig,
    prev_result: Option<Value>,
    #[serde(rename = "cni.dev/valid-attachments")]
    valid_attachments: Option<Vec<Attachment>>,
}

#[derive(Deserialize)]
struct RawIpam {
    subnet: Option<Ipv4Network>,
    gateway: Option<Ipv4Addr>,
}

/// What IPv4 asks of every link (RFC 791), and the most that a packet can be.
const MTU_BYTES: std::ops::RangeInclusive<u32> = 576..=65535;

/// Ethernet's.
const DEFAULT_MTU_BYTES: u32 = 1500;

impl Config {
    /// The version that a configuration names, without looking at the rest.
    ///
    /// # Errors
    /// If it isn't JSON, names no version or one that isn't spoken.
    pub fn version(text: &[u8]) -> Result<Version, ConfigError> {
        let head: Head = object(text)?;
        // A configuration without a version is one of 0.1.0 (CNI 1.1.0 §1), which isn't spoken.
        let version = head.version.unwrap_or_else(|| "0.1.0".to_owned());
        let supported = || crate::SUPPORTED.map(Version::as_str).to_vec();
        version.parse().map_err(|_unknown: crate::version::UnknownVersion| ConfigError::Version(version, supported()))
    }

    /// Reads and checks a configuration.
    ///
    /// # Errors
    /// If it can't be used, with the first reason found.
    pub fn read(text: &[u8]) -> Result<Self, ConfigError> {
        let version = Self::version(text)?;
        let raw: Raw = object(text)?;
        let invalid = |field, reason| ConfigError::Invalid { field, reason };
        let missing = |field| move || invalid(field, "is missing");
        let name = raw.name.ok_or_else(missing("name"))?;
        if !is_identifier(&name) {
            return Err(invalid("name", "letters, digits, '_', '.' and '-' only"));
        }
        let bridge = raw.bridge.ok_or_else(missing("bridge"))?;
        if bridge.is_empty() || bridge.len() > 15 || bridge.contains(['/', ':', ' ']) {
            return Err(invalid("bridge", "no name of a device"));
        }
        let mtu_bytes = raw.mtu.unwrap_or(DEFAULT_MTU_BYTES);
        if !MTU_BYTES.contains(&mtu_bytes) {
            return Err(invalid("mtu", "not within 576 and 65535"));
        }
        let ipam = raw.ipam.ok_or_else(missing("ipam"))?;
        let subnet = ipam.subnet.ok_or_else(missing("ipam.subnet"))?;
        if subnet.prefix() > 30 {
            return Err(invalid("ipam.subnet", "has no room for a gateway and a pod"));
        }
        if subnet.ip() != subnet.network() {
            return Err(invalid("ipam.subnet", "has host bits set"));
        }
        let gateway = ipam.gateway.ok_or_else(missing("ipam.gateway"))?;
        if !subnet.contains(gateway) || gateway == subnet.network() || gateway == subnet.broadcast() {
            return Err(invalid("ipam.gateway", "not an address of the subnet"));
        }
        let state_dir = raw.state_dir.filter(|path| path.is_absolute());
        Ok(Self {
            version,
            name,
            bridge,
            mtu_bytes,
            ipam: Ipam { subnet, gateway },
            state_dir: state_dir.ok_or_else(|| invalid("stateDir", "not an absolute path"))?,
            runtime: raw.runtime_config,
            prev_result: raw.prev_result,
            valid_attachments: raw.valid_attachments,
        })
    }
}

/// Reads an object. Serde alone would also take an array of the fields' values.
fn object<T: serde::de::DeserializeOwned>(text: &[u8]) -> Result<T, ConfigError> {
    let object: serde_json::Map<String, Value> = serde_json::from_slice(text).map_err(ConfigError::Decode)?;
    serde_json::from_value(Value::Object(object)).map_err(ConfigError::Decode)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn good() -> Value {
        json!({
            "cniVersion": "1.1.0", "name": "weft", "type": "weft-cni", "bridge": "weft0", "mtu": 1450,
            "ipam": {"subnet": "10.42.1.0/24", "gateway": "10.42.1.1"}, "stateDir": "/run/weft/n/cni",
            "a-field": "of somebody else"
        })
    }

    fn read(value: &Value) -> Result<Config, ConfigError> {
        Config::read(value.to_string().as_bytes())
    }

    #[test]
    fn reads_what_the_agent_writes() {
        let config = read(&good()).unwrap();
        assert_eq!(config.ipam.subnet.to_string(), "10.42.1.0/24");
        assert_eq!((config.bridge.as_str(), config.mtu_bytes), ("weft0", 1450));
    }

    #[test]
    fn each_mistake_has_its_code() {
        assert_eq!(Config::read(b"{not json").unwrap_err().code(), Code::Decode);
        assert_eq!(Config::read(b"[]").unwrap_err().code(), Code::Decode);
        let with = |pointer: &str, value: Value| {
            let mut config = good();
            *config.pointer_mut(pointer).unwrap() = value;
            read(&config).unwrap_err().code()
        };
        assert_eq!(with("/cniVersion", json!("2.0.0")), Code::IncompatibleVersion);
        assert_eq!(with("/cniVersion", Value::Null), Code::IncompatibleVersion);
        assert_eq!(with("/mtu", json!("big")), Code::Decode);
        for (pointer, value) in [
            ("/name", json!("../x")),
            ("/name", Value::Null),
            ("/bridge", json!("")),
            ("/mtu", json!(100)),
            ("/ipam", Value::Null),
            ("/ipam/subnet", json!("10.42.1.5/24")),
            ("/ipam/subnet", json!("10.42.1.0/31")),
            ("/ipam/gateway", json!("10.42.2.1")),
            ("/ipam/gateway", json!("10.42.1.255")),
            ("/stateDir", json!("relative")),
        ] {
            assert_eq!(with(pointer, value.clone()), Code::InvalidConfig, "{pointer} {value}");
        }
    }
}

//! The network's configuration, as a plugin gets it on standard input.

use std::path::PathBuf;

use ipnetwork::IpNetwork;
use serde::Deserialize;
use serde_json::Value;

use crate::call::is_identifier;
use crate::range::RawIpam;
use crate::{Code, Ipam, Version};

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

/// What the caller adds for one container (capability `ips`).
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
pub struct RuntimeConfig {
    /// The addresses that the container must get; one of each family at most.
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

/// What IPv4 asks of every link (RFC 791), and the most that a packet can be.
const MTU_BYTES: std::ops::RangeInclusive<u32> = 576..=65535;

/// What IPv6 asks of every link (RFC 8200 §5).
const IPV6_MTU_BYTES: u32 = 1280;

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
        version
            .parse()
            .map_err(|_unknown: crate::version::UnknownVersion| ConfigError::Version(version, supported()))
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
        let ipam = raw.ipam.ok_or_else(missing("ipam"))?.check()?;
        if ipam.ranges.iter().any(|range| range.subnet.is_ipv6()) && mtu_bytes < IPV6_MTU_BYTES {
            return Err(invalid("mtu", "less than the 1280 that IPv6 needs"));
        }
        let state_dir = raw.state_dir.filter(|path| path.is_absolute());
        Ok(Self {
            version,
            name,
            bridge,
            mtu_bytes,
            ipam,
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
        assert_eq!(config.ipam.ranges[0].subnet.to_string(), "10.42.1.0/24");
        assert_eq!((config.bridge.as_str(), config.mtu_bytes), ("weft0", 1450));
    }

    #[test]
    fn reads_a_range_of_each_family() {
        let v4 = json!({"subnet": "10.42.1.0/24", "gateway": "10.42.1.1"});
        let v6 = json!({"subnet": "fd00:42:0:1::/64", "gateway": "fd00:42:0:1::1"});
        let with = |ipam: Value| {
            let mut config = good();
            config["ipam"] = ipam;
            read(&config)
        };
        assert_eq!(with(json!({"ranges": [v4]})).unwrap().ipam, read(&good()).unwrap().ipam);
        let both = with(json!({"ranges": [v6, v4]})).unwrap().ipam.ranges;
        assert_eq!(both.iter().map(|range| range.subnet.is_ipv6()).collect::<Vec<_>>(), [true, false]);
        assert_eq!(with(v6.clone()).unwrap().ipam.ranges, [both[0]]);
        for mistake in [
            json!({"ranges": []}),
            json!({"ranges": [v4, v4]}),
            json!({"ranges": [v4, v6, v4]}),
            json!({"ranges": [{"subnet": "10.42.1.0/24"}]}),
            json!({"ranges": [v6], "subnet": "10.42.1.0/24"}),
            json!({"subnet": "fd00::/127", "gateway": "fd00::1"}),
            json!({"subnet": "fd00::/64", "gateway": "fd00::"}),
            json!({"subnet": "fd00::/64", "gateway": "10.42.1.1"}),
        ] {
            assert_eq!(with(mistake.clone()).unwrap_err().code(), Code::InvalidConfig, "{mistake}");
        }
        let mut narrow = good();
        (narrow["ipam"], narrow["mtu"]) = (v6, json!(1279));
        assert_eq!(read(&narrow).unwrap_err().code(), Code::InvalidConfig);
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

//! The network's configuration, as a plugin gets it on standard input.

use std::path::PathBuf;

use serde::Deserialize;
use serde_json::Value;

use crate::call::is_identifier;
use crate::range::RawIpam;
use crate::runtime::RawRuntime;
use crate::{Code, Dns, Ipam, RuntimeConfig, Version};

/// A configuration that has been checked.
#[derive(Clone, Debug)]
pub struct Config {
    /// The version that the caller speaks, and wants the result in.
    pub version: Version,
    /// The network's name.
    pub name: String,
    /// What pods are attached to; `None` in chained use, where another plugin attaches them.
    pub fabric: Option<Fabric>,
    /// Where leases are kept.
    pub state_dir: PathBuf,
    /// What the caller adds for this container.
    pub runtime: RuntimeConfig,
    /// What the result says about names.
    pub dns: Dns,
    /// What the plugin before this one answered, in chained use; what ADD answered, for CHECK and DEL.
    pub prev_result: Option<Value>,
    /// GC: the attachments that are still valid. None given means that none is, as libcni has it.
    pub valid_attachments: Vec<Attachment>,
}

/// What pods are attached to.
#[derive(Clone, Debug)]
pub struct Fabric {
    /// The bridge that pods are ports of.
    pub bridge: String,
    /// Largest packet in bytes.
    pub mtu_bytes: u32,
    /// Where addresses come from.
    pub ipam: Ipam,
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
    runtime_config: RawRuntime,
    #[serde(default)]
    dns: Dns,
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
        if raw.prev_result.as_ref().is_some_and(|result| !result.is_object()) {
            return Err(invalid("prevResult", "not an object"));
        }
        let fabric = Fabric::read(raw.bridge, raw.mtu, raw.ipam)?;
        let state_dir = raw.state_dir.filter(|path| path.is_absolute());
        let runtime = raw.runtime_config.check()?;
        Ok(Self {
            version,
            name,
            fabric,
            state_dir: state_dir.ok_or_else(|| invalid("stateDir", "not an absolute path"))?,
            dns: runtime.dns.clone().unwrap_or(raw.dns),
            runtime,
            prev_result: raw.prev_result,
            valid_attachments: raw.valid_attachments.unwrap_or_default(),
        })
    }
}

impl Fabric {
    /// None of the three is chained use; what it lacks otherwise is missing.
    fn read(
        bridge: Option<String>,
        mtu: Option<u32>,
        ipam: Option<RawIpam>,
    ) -> Result<Option<Self>, ConfigError> {
        let invalid = |field, reason| ConfigError::Invalid { field, reason };
        if bridge.is_none() && mtu.is_none() && ipam.is_none() {
            return Ok(None);
        }
        let bridge = bridge.ok_or_else(|| invalid("bridge", "is missing"))?;
        if bridge.is_empty()
            || bridge.len() > 15
            || bridge.contains(['/', ':', ' '])
            || bridge.starts_with('.')
        {
            return Err(invalid("bridge", "no name of a device"));
        }
        let mtu_bytes = mtu.unwrap_or(DEFAULT_MTU_BYTES);
        if !MTU_BYTES.contains(&mtu_bytes) {
            return Err(invalid("mtu", "not within 576 and 65535"));
        }
        let ipam = ipam.ok_or_else(|| invalid("ipam", "is missing"))?.check()?;
        if ipam.ranges.iter().any(|range| range.subnet.is_ipv6()) && mtu_bytes < IPV6_MTU_BYTES {
            return Err(invalid("mtu", "less than the 1280 that IPv6 needs"));
        }
        Ok(Some(Self { bridge, mtu_bytes, ipam }))
    }
}

/// Reads an object. Serde alone would also take an array of the fields' values.
fn object<T: serde::de::DeserializeOwned>(text: &[u8]) -> Result<T, ConfigError> {
    let object: serde_json::Map<String, Value> = serde_json::from_slice(text).map_err(ConfigError::Decode)?;
    serde_json::from_value(Value::Object(object)).map_err(ConfigError::Decode)
}

#[cfg(test)]
mod tests;

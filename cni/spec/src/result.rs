//! What a plugin answers on success, in the form of each version.

use std::net::IpAddr;

use ipnetwork::IpNetwork;
use serde::Serialize;
use serde_json::{Value, json};

use crate::{Dns, SUPPORTED, Version};

/// The result of ADD.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AddResult {
    /// The devices that were made or used.
    pub interfaces: Vec<Interface>,
    /// The addresses.
    pub ips: Vec<IpConfig>,
    /// The routes in the container.
    pub routes: Vec<Route>,
    /// What is known about names.
    pub dns: Dns,
}

/// A device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Interface {
    /// Name.
    pub name: String,
    /// Hardware address.
    pub mac: String,
    /// Largest packet in bytes.
    pub mtu_bytes: u32,
    /// Path of the container's namespace; `None` on the host.
    pub sandbox: Option<String>,
}

/// An address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IpConfig {
    /// The address and its subnet's prefix length.
    pub address: IpNetwork,
    /// The way out.
    pub gateway: IpAddr,
    /// Which of the interfaces has it.
    pub interface: usize,
}

/// A route.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Route {
    /// Where to.
    pub destination: IpNetwork,
    /// Through whom.
    pub gateway: IpAddr,
}

impl AddResult {
    /// The result as a version writes it.
    pub fn to_json(&self, version: Version) -> Value {
        let interfaces: Vec<Value> = self.interfaces.iter().map(|one| one.to_json(version)).collect();
        let ips: Vec<Value> = self
            .ips
            .iter()
            .map(|ip| {
                let mut value =
                    json!({"address": ip.address.to_string(), "gateway": ip.gateway, "interface": ip.interface});
                if version < Version::V1_0_0 {
                    value["version"] = json!(if ip.address.is_ipv4() { "4" } else { "6" });
                }
                value
            })
            .collect();
        let routes: Vec<Value> = self
            .routes
            .iter()
            .map(|one| json!({"dst": one.destination.to_string(), "gw": one.gateway}))
            .collect();
        json!({
            "cniVersion": version.as_str(), "interfaces": interfaces, "ips": ips, "routes": routes, "dns": self.dns,
        })
    }
}

impl Interface {
    fn to_json(&self, version: Version) -> Value {
        let mut value = json!({"name": self.name, "mac": self.mac});
        if version >= Version::V1_1_0 {
            value["mtu"] = json!(self.mtu_bytes);
        }
        if let Some(sandbox) = &self.sandbox {
            value["sandbox"] = json!(sandbox);
        }
        value
    }
}

/// The answer to VERSION.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct VersionResult {
    cni_version: String,
    supported_versions: Vec<&'static str>,
}

impl VersionResult {
    /// Answers in the version that was asked in, whether it is spoken or not (CNI 1.1.0 §2 VERSION).
    pub fn new(asked: String) -> Self {
        Self { cni_version: asked, supported_versions: SUPPORTED.map(Version::as_str).to_vec() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_version_has_its_form() {
        let result = AddResult {
            interfaces: vec![Interface {
                name: "eth0".to_owned(),
                mac: "02:00:00:00:00:01".to_owned(),
                mtu_bytes: 1450,
                sandbox: Some("/run/netns/x".to_owned()),
            }],
            ips: vec![IpConfig {
                address: "10.42.1.7/24".parse().unwrap(),
                gateway: "10.42.1.1".parse().unwrap(),
                interface: 0,
            }],
            routes: vec![Route {
                destination: "0.0.0.0/0".parse().unwrap(),
                gateway: "10.42.1.1".parse().unwrap(),
            }],
            dns: Dns { nameservers: vec!["10.43.0.10".to_owned()], ..Dns::default() },
        };
        let old = result.to_json(Version::V0_4_0);
        assert_eq!(
            old["ips"][0],
            json!({"version": "4", "address": "10.42.1.7/24", "gateway": "10.42.1.1", "interface": 0})
        );
        assert_eq!(old["interfaces"][0]["mtu"], Value::Null);
        let new = result.to_json(Version::V1_1_0);
        assert_eq!(
            (&new["cniVersion"], &new["dns"]),
            (&json!("1.1.0"), &json!({"nameservers": ["10.43.0.10"]}))
        );
        assert_eq!(new["ips"][0], json!({"address": "10.42.1.7/24", "gateway": "10.42.1.1", "interface": 0}));
        assert_eq!(new["interfaces"][0]["mtu"], 1450);
        assert_eq!(new["routes"][0], json!({"dst": "0.0.0.0/0", "gw": "10.42.1.1"}));
    }
}

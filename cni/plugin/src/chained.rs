//! Chained use: another plugin has attached the pod, and this one adds what it is asked for. It answers what that one did.

use std::net::IpAddr;
use std::os::fd::AsFd as _;

use ipnetwork::IpNetwork;
use serde_json::{Value, json};
use weft_cni_ipam::Owner;
use weft_cni_netlink::{Class, Link, Netlink, namespace};
use weft_cni_spec::{Call, Config};

use crate::capabilities::{self, Ends};
use crate::error::PluginError;
use crate::leases;

/// A pod that another plugin has attached.
struct Attached {
    addresses: Vec<IpAddr>,
    host: Netlink,
    port: Option<Link>,
    pod: Netlink,
    inside: Link,
}

pub(crate) fn add(call: &Call, config: &Config, owner: &Owner) -> Result<Value, PluginError> {
    let runtime = &config.runtime;
    if runtime.mac.is_some() || !runtime.ips.is_empty() {
        return Err(PluginError::NotChained("ips and mac"));
    }
    let mut attached = Attached::find(call, config)?;
    let added = attached.add(config, owner);
    let undo = || capabilities::unmap_ports(&leases(config)?, owner);
    added.map_err(|failed| match undo() {
        Ok(()) => failed,
        Err(source) => PluginError::Undo { failed: Box::new(failed), source: Box::new(source) },
    })?;
    // As it was handed on, in the same version (CNI 1.1.0 §4 ADD).
    let mut result = config.prev_result.clone().unwrap_or_default();
    result["cniVersion"] = json!(config.version.as_str());
    if let Some(dns) = &runtime.dns {
        result["dns"] = json!(dns);
    }
    Ok(result)
}

pub(crate) fn check(call: &Call, config: &Config) -> Result<(), PluginError> {
    let mut attached = Attached::find(call, config)?;
    let addresses = attached.addresses.clone();
    capabilities::check(config, &addresses, &mut attached.ends())
}

impl Attached {
    fn find(call: &Call, config: &Config) -> Result<Self, PluginError> {
        let prev = config.prev_result.as_ref().ok_or(PluginError::Missing("prevResult"))?;
        let path = call.netns.as_deref().ok_or(PluginError::Missing("CNI_NETNS"))?;
        let netns = namespace::open(path)
            .map_err(|source| PluginError::Netns { path: path.to_path_buf(), source })?;
        let mut host = Netlink::open()?;
        let mut pod = Netlink::open_within(netns.as_fd())?;
        let inside = match pod.link(&call.ifname) {
            Err(error) if error.class() == Class::NotFound => {
                return Err(PluginError::Check(format!("{} is gone", call.ifname)));
            }
            other => other?,
        };
        let port = match inside.peer_index.filter(|_| inside.kind == "veth") {
            // The number is one of the other end's namespace, which may be a third one.
            Some(index) => match host.link_at(index) {
                Err(error) if error.class() == Class::NotFound => None,
                other => Some(other?),
            },
            None => None,
        };
        let port = port.filter(|port| port.kind == "veth" && port.peer_index == Some(inside.index));
        Ok(Self { addresses: addresses(prev), host, port, pod, inside })
    }

    fn add(&mut self, config: &Config, owner: &Owner) -> Result<(), PluginError> {
        if !config.runtime.ports.is_empty() {
            let address = self.addresses.first().ok_or(PluginError::Missing("prevResult.ips"))?;
            let device = self.host.device_towards(*address)?;
            let device = self.host.link_at(device)?.name;
            capabilities::map_ports(config, owner, &self.addresses, &device)?;
        }
        capabilities::shape(config, &mut self.ends())
    }

    fn ends(&mut self) -> Ends<'_> {
        Ends { host: &mut self.host, port: self.port.as_ref(), pod: &mut self.pod, inside: &self.inside }
    }
}

/// The addresses of a result that are of a container, not of the host.
pub(crate) fn addresses(result: &Value) -> Vec<IpAddr> {
    let of_container = |ip: &Value| {
        let interface = ip.get("interface").and_then(Value::as_u64).and_then(|n| usize::try_from(n).ok());
        let interface = interface.and_then(|n| result.get("interfaces")?.get(n));
        let sandbox = interface.and_then(|interface| interface.get("sandbox")).and_then(Value::as_str);
        interface.is_none() || sandbox.is_some_and(|sandbox| !sandbox.is_empty())
    };
    let ips = result.get("ips").and_then(Value::as_array).into_iter().flatten();
    let networks = ips.filter(|ip| of_container(ip));
    let networks = networks.filter_map(|ip| ip.get("address")?.as_str()?.parse::<IpNetwork>().ok());
    networks.map(|network| network.ip()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn takes_the_addresses_of_the_container() {
        let result = json!({
            "interfaces": [{"name": "br0"}, {"name": "eth0", "sandbox": "/run/netns/x"}],
            "ips": [
                {"address": "10.1.0.1/24", "interface": 0},
                {"address": "10.1.0.7/24", "interface": 1},
                {"address": "fd00::7/64"},
            ],
        });
        let expected: Vec<IpAddr> = ["10.1.0.7", "fd00::7"].map(|ip| ip.parse().unwrap()).into();
        assert_eq!(addresses(&result), expected);
        assert_eq!(addresses(&json!({})), Vec::<IpAddr>::new());
    }
}

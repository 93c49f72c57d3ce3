//! CHECK: whether everything is still as ADD left it.

use std::net::IpAddr;
use std::os::fd::AsFd as _;

use ipnetwork::IpNetwork;
use serde_json::Value;
use weft_cni_ipam::Owner;
use weft_cni_netlink::{Address, Class, Link, Netlink, namespace};
use weft_cni_spec::{Call, Config, Fabric};

use crate::attach::everywhere;
use crate::capabilities::{self, Ends};
use crate::error::PluginError;
use crate::{leases, names};

pub(crate) fn check(call: &Call, config: &Config, fabric: &Fabric, owner: &Owner) -> Result<(), PluginError> {
    let prev = config.prev_result.as_ref().ok_or(PluginError::Missing("prevResult"))?;
    let path = call.netns.as_deref().ok_or(PluginError::Missing("CNI_NETNS"))?;
    let netns =
        namespace::open(path).map_err(|source| PluginError::Netns { path: path.to_path_buf(), source })?;

    let held = leases(config)?.held(owner)?;
    let mut host = Netlink::open()?;
    let bridge = find(&mut host, &fabric.bridge)?;
    let port = find(&mut host, &names::host_interface(&config.name, owner))?;
    if port.master != Some(bridge.index) {
        return Err(wrong(format!("{} is no port of {}", port.name, bridge.name)));
    }
    let mut pod = Netlink::open_within(netns.as_fd())?;
    let interface = find(&mut pod, &owner.ifname)?;
    let (on_host, in_pod, routes) = (host.addresses()?, pod.addresses()?, pod.routes()?);
    let has = |all: &[Address], link: &Link, network: IpNetwork| {
        all.iter().any(|one| one.index == link.index && one.network == network)
    };
    for range in &fabric.ipam.ranges {
        let address = held.iter().find(|address| range.subnet.contains(**address)).copied();
        let address =
            address.ok_or_else(|| wrong(format!("the container holds no address of {}", range.subnet)))?;
        if !answered(prev, address) {
            return Err(wrong(format!("the container holds {address}, which prevResult doesn't name")));
        }
        let gateway = range.gateway;
        if !has(&on_host, &bridge, range.network(gateway)) {
            return Err(wrong(format!("{} doesn't have the address {gateway}", bridge.name)));
        }
        if !has(&in_pod, &interface, range.network(address)) {
            return Err(wrong(format!("{} doesn't have the address {address}", interface.name)));
        }
        let everywhere = everywhere(address);
        if !routes.iter().any(|route| route.destination == everywhere && route.gateway == Some(gateway)) {
            return Err(wrong(format!("the container has no default route through {gateway}")));
        }
    }
    let mut ends = Ends { host: &mut host, port: Some(&port), pod: &mut pod, inside: &interface };
    capabilities::check(config, &held, &mut ends)
}

fn wrong(what: impl Into<String>) -> PluginError {
    PluginError::Check(what.into())
}

/// Whether a result names an address.
fn answered(result: &Value, address: IpAddr) -> bool {
    let ips = result.get("ips").and_then(Value::as_array).into_iter().flatten();
    let networks = ips.filter_map(|ip| ip.get("address")?.as_str()?.parse::<IpNetwork>().ok());
    networks.into_iter().any(|network| network.ip() == address)
}

/// A device that must be there and up.
fn find(netlink: &mut Netlink, name: &str) -> Result<Link, PluginError> {
    let link = match netlink.link(name) {
        Err(error) if error.class() == Class::NotFound => return Err(wrong(format!("{name} is gone"))),
        other => other?,
    };
    if link.up { Ok(link) } else { Err(wrong(format!("{name} is down"))) }
}

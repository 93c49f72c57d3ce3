//! Owns cluster IPs: which ranges there are, which address is free, and the IPAddress that says whose it is.

use super::{invalid, text};
use crate::api::Api;
use crate::cache::{Item, object_value_bytes};
use crate::config::Network;
use crate::registry::Extra;
use rand::RngExt;
use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::net::IpAddr;
use std::ops::RangeInclusive;
use std::sync::Arc;
use weft_control_api::field::{FieldError, FieldPath};
use weft_control_api::status::Status;
use weft_control_store::{Condition, Op, Revision};

/// The group of ServiceCIDR and IPAddress.
pub(super) const GROUP: &str = "networking.k8s.io";
/// Keys of cluster IPs: IPAddress objects.
const ADDRESSES: &str = "/registry/networking.k8s.io/ipaddresses/";
/// The label that says who made an IPAddress.
pub(super) const MANAGED_BY: &str = "ipaddress.kubernetes.io/managed-by";
/// Upstream's name of the allocator.
pub(super) const MANAGER: &str = "ipallocator.k8s.io";
/// The label that says an IPAddress's family.
pub(super) const FAMILY: &str = "ipaddress.kubernetes.io/ip-family";

/// A range that addresses are taken from.
struct Source {
    network: Network,
    /// The key of the ServiceCIDR that has it.
    key: String,
    /// The ServiceCIDR as it was looked at: if it changes before the address is written, the choice is made anew.
    revision: u64,
}

/// An address as IPAddress objects are named; what is no address stays as it is.
fn canonical(address: &str) -> String {
    address.parse().map_or_else(|_no_address| address.to_owned(), |ip: IpAddr| ip.to_string())
}

/// The addresses that a Service has.
pub(super) fn of(spec: &Value) -> BTreeSet<String> {
    let list = spec["clusterIPs"].as_array().into_iter().flatten();
    list.chain(std::iter::once(&spec["clusterIP"]))
        .filter_map(Value::as_str)
        .filter(|ip| !ip.is_empty() && *ip != "None")
        .map(canonical)
        .collect()
}

/// The IPAddress of an address, if it is taken.
pub(super) fn taken(api: &Api, address: &str) -> Option<Arc<Item>> {
    api.cached(GROUP, "ipaddresses", "", address)
}

/// Gives a Service an address of each of its families, and claims those that it asks for.
pub(super) async fn take(
    api: &Api,
    object: &mut Value,
    had: &BTreeSet<String>,
    extra: &mut Extra,
) -> Result<(), Status> {
    let spec = &object["spec"];
    if text(spec, "type") == "ExternalName" || text(spec, "clusterIP") == "None" {
        return Ok(());
    }
    let strings = |list: &Value| -> Vec<String> {
        let list = list.as_array().into_iter().flatten();
        list.filter_map(|one| one.as_str().map(str::to_owned)).collect()
    };
    let (families, mut addresses) = (strings(&spec["ipFamilies"]), strings(&spec["clusterIPs"]));
    for (index, family) in families.iter().enumerate() {
        let asked = addresses.get(index).filter(|asked| !asked.is_empty()).cloned();
        if asked.as_ref().is_some_and(|asked| had.contains(&canonical(asked))) {
            continue;
        }
        let (address, source) = match choose(api, object, family, asked.as_deref()) {
            Ok(chosen) => chosen,
            // What is in the way may just have gone, and a range may just have come.
            Err(_) => {
                api.freshen().await?;
                choose(api, object, family, asked.as_deref())?
            }
        };
        claim(object, &address, &source, extra);
        if asked.is_none() {
            addresses.resize(index, String::new());
            addresses.push(address);
        }
    }
    object["spec"]["clusterIP"] = json!(addresses.first());
    object["spec"]["clusterIPs"] = json!(addresses);
    Ok(())
}

/// The address that a Service asks for, or a free one, as the cache shows it.
fn choose(api: &Api, object: &Value, family: &str, asked: Option<&str>) -> Result<(String, Source), Status> {
    let sources = sources(api, family == "IPv6");
    let Some(asked) = asked else {
        let (address, source) = free(api, sources)
            .ok_or_else(|| Status::internal("failed to allocate a serviceIP: range is full"))?;
        return Ok((address.to_string(), source));
    };
    let address = asked.parse::<IpAddr>().ok();
    let source = address.and_then(|address| sources.into_iter().find(|one| holds(one.network, address)));
    let why = match source {
        None => "the provided network does not match the current range",
        Some(_) if taken(api, &canonical(asked)).is_some() => "provided IP is already allocated",
        Some(source) => return Ok((canonical(asked), source)),
    };
    let detail = format!("failed to allocate IP {asked}: {why}");
    let path = FieldPath::new("spec.clusterIPs");
    Err(invalid(object, vec![FieldError::invalid(&path, object["spec"]["clusterIPs"].clone(), detail)]))
}

/// The ranges of a family that are ready and stay, the configured one first.
fn sources(api: &Api, ipv6: bool) -> Vec<Source> {
    let Some(resource) = api.resources.by_plural(GROUP, "servicecidrs") else { return Vec::new() };
    let mut found = Vec::new();
    for item in api.cache.snapshot(resource.id).objects.values() {
        let object = item.parse();
        if !object["metadata"]["deletionTimestamp"].is_null() || !is_ready(&object) {
            continue;
        }
        for cidr in object["spec"]["cidrs"].as_array().into_iter().flatten().filter_map(Value::as_str) {
            if let Ok(network) = cidr.parse::<Network>()
                && network.is_ipv6() == ipv6
            {
                found.push(Source { network, key: resource.store_key(&item.key), revision: item.revision });
            }
        }
    }
    found.sort_by_key(|source| !api.config.service_cidrs.contains(&source.network));
    found
}

/// A ServiceCIDR without a condition is ready: its controller may not be running.
fn is_ready(service_cidr: &Value) -> bool {
    let conditions = service_cidr["status"]["conditions"].as_array().into_iter().flatten();
    conditions.filter(|one| one["type"] == "Ready").all(|one| one["status"] == "True")
}

/// The offsets that addresses are given at: neither the network's own address nor, for IPv4, the broadcast address.
fn usable(network: Network) -> RangeInclusive<u64> {
    1..=network.size().saturating_sub(if network.is_ipv6() { 1 } else { 2 })
}

fn holds(network: Network, address: IpAddr) -> bool {
    let last = usable(network);
    let edge = |offset: u64| network.nth(offset) == address;
    network.contains(address)
        && !last.is_empty()
        && !edge(0)
        && (network.is_ipv6() || !edge(network.size() - 1))
}

/// A free address: of the upper part of a range first, since the lower one is kept for those who ask (KEP-3070).
fn free(api: &Api, sources: Vec<Source>) -> Option<(IpAddr, Source)> {
    let known = api.resources.by_plural(GROUP, "ipaddresses").map_or(0, |one| api.cache.count(one.id));
    let known = u64::try_from(known).unwrap_or(u64::MAX);
    sources.into_iter().find_map(|source| {
        let usable = usable(source.network);
        let kept = kept(*usable.end());
        let parts = [kept + 1..=*usable.end(), 1..=kept];
        let found = parts.into_iter().find_map(|part| {
            free_in(source.network, &part, known, |address| taken(api, &address.to_string()).is_some())
        });
        found.map(|address| (address, source))
    })
}

/// How many addresses at the beginning of a range are kept for those who ask: a sixteenth, at least 16 and at most 256.
fn kept(usable: u64) -> u64 {
    if usable < 16 { 0 } else { (usable / 16).clamp(16, 256) }
}

/// A free address in a part of a network, looked for from a random one on. Among one more than are `known` to be taken
/// there must be a free one.
fn free_in(
    network: Network,
    part: &RangeInclusive<u64>,
    known: u64,
    taken: impl Fn(IpAddr) -> bool,
) -> Option<IpAddr> {
    if part.is_empty() {
        return None;
    }
    let length = (part.end() - part.start()).saturating_add(1);
    let first = rand::rng().random_range(0..length);
    (0..=known.min(length - 1)).find_map(|step| {
        let offset = (u128::from(first) + u128::from(step)) % u128::from(length);
        let address = network.nth(part.start() + u64::try_from(offset).unwrap_or_default());
        (!taken(address)).then_some(address)
    })
}

fn claim(service: &Value, address: &str, source: &Source, extra: &mut Extra) {
    let key = format!("{ADDRESSES}{address}");
    extra.conditions.push(Condition::Absent(key.clone()));
    extra.ops.push(Op::Put { key, value: object_value_bytes(&object(address, &service["metadata"])) });
    // One ServiceCIDR may have the ranges of both families.
    let stays = Condition::ModRevision(source.key.clone(), Revision(source.revision));
    if !extra.conditions.contains(&stays) {
        extra.conditions.push(stays);
    }
}

/// An IPAddress object, as upstream's allocator makes it.
pub(super) fn object(address: &str, service: &Value) -> Value {
    json!({
        "apiVersion": "networking.k8s.io/v1",
        "kind": "IPAddress",
        "metadata": {
            "name": address,
            "uid": uuid::Uuid::new_v4().to_string(),
            "creationTimestamp": crate::registry::now(),
            "labels": {FAMILY: family(address), MANAGED_BY: MANAGER},
        },
        "spec": {"parentRef": {"group": "", "resource": "services",
            "namespace": service["namespace"], "name": service["name"]}},
    })
}

/// The family of an address, as the label says it.
pub(super) fn family(address: &str) -> &'static str {
    if address.contains(':') { "IPv6" } else { "IPv4" }
}

/// Whether an IPAddress says that it is this Service's.
pub(super) fn is_parent(address: &Value, service: &Value) -> bool {
    let (parent, metadata) = (&address["spec"]["parentRef"], &service["metadata"]);
    text(parent, "group").is_empty()
        && parent["resource"] == "services"
        && parent["namespace"] == metadata["namespace"]
        && parent["name"] == metadata["name"]
}

/// Whether an address is in a range of some ServiceCIDR, whatever its state.
pub(super) fn in_some_range(api: &Api, address: &str) -> bool {
    let Ok(address) = address.parse::<IpAddr>() else { return false };
    let Some(resource) = api.resources.by_plural(GROUP, "servicecidrs") else { return false };
    api.cache.snapshot(resource.id).objects.values().any(|item| {
        let object = item.parse();
        let cidrs = object["spec"]["cidrs"].as_array().into_iter().flatten().filter_map(Value::as_str);
        cidrs.filter_map(|cidr| cidr.parse::<Network>().ok()).any(|network| network.contains(address))
    })
}

/// Each range with the number of its addresses that are taken and that are free.
pub(crate) fn usage(api: &Api) -> Vec<(String, u64, u64)> {
    let objects = |plural| {
        let resource = api.resources.by_plural(GROUP, plural)?;
        Some(api.cache.snapshot(resource.id).objects)
    };
    let (Some(ranges), Some(addresses)) = (objects("servicecidrs"), objects("ipaddresses")) else {
        return Vec::new();
    };
    let addresses: Vec<IpAddr> = addresses.values().filter_map(|item| item.name().parse().ok()).collect();
    let mut found = Vec::new();
    for item in ranges.values() {
        let range = item.parse();
        let cidrs = range["spec"]["cidrs"].as_array().into_iter().flatten().filter_map(Value::as_str);
        for network in cidrs.filter_map(|cidr| cidr.parse::<Network>().ok()) {
            let taken = addresses.iter().filter(|address| holds(network, **address)).count();
            let taken = u64::try_from(taken).unwrap_or(u64::MAX);
            found.push((network.to_string(), taken, usable(network).end().saturating_sub(taken)));
        }
    }
    found
}

/// Gives addresses of a Service back; what is somebody else's by now stays.
pub(super) fn release<'a>(
    api: &Api,
    service: &Value,
    gone: impl Iterator<Item = &'a String>,
    extra: &mut Extra,
) {
    for address in gone {
        let Some(item) = taken(api, address) else { continue };
        if is_parent(&item.parse(), service) {
            let key = format!("{ADDRESSES}{address}");
            extra.conditions.push(Condition::ModRevision(key.clone(), Revision(item.revision)));
            extra.ops.push(Op::Delete { key });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn network(text: &str) -> Network {
        text.parse().unwrap()
    }

    #[test]
    fn every_free_address_is_found() {
        let net = network("10.43.0.0/24");
        let usable = usable(net);
        assert_eq!(usable, 1..=254);
        let given = free_in(net, &(17..=254), 0, |_| false).unwrap();
        assert!(net.contains(given) && given > net.nth(16), "{given}");
        let three: IpAddr = "10.43.0.3".parse().unwrap();
        assert_eq!(free_in(net, &(1..=16), 300, |address| address != three), Some(three));
        assert_eq!(free_in(net, &(1..=16), 300, |_| true), None);
        // One taken address can't hide the free one next to it.
        let half = |address: IpAddr| address.to_string() == "10.43.0.9";
        assert!((0..100).all(|_| free_in(net, &(9..=10), 1, half).is_some()));
    }

    #[test]
    fn parts_and_edges() {
        assert_eq!([kept(14), kept(254), kept(65_534), kept(u64::MAX)], [0, 16, 256, 256]);
        let tiny = network("10.43.0.0/31");
        assert!(usable(tiny).is_empty() && !holds(tiny, tiny.nth(0)));
        let net = network("10.43.0.0/29");
        let held: Vec<bool> = (0..8).map(|offset| holds(net, net.nth(offset))).collect();
        assert_eq!(held, [false, true, true, true, true, true, true, false]);
        let v6 = network("fd00::/125");
        assert!(!holds(v6, v6.nth(0)) && holds(v6, v6.nth(7)) && !holds(v6, net.nth(1)));
        let huge = network("fd00::/48");
        assert!(free_in(huge, &(kept(u64::MAX) + 1..=*usable(huge).end()), 0, |_| false).is_some());
    }

    #[test]
    fn names_are_canonical() {
        let spec = json!({"clusterIP": "FD00:0::1", "clusterIPs": ["FD00:0::1", "10.0.0.1"]});
        let expected: Vec<String> = vec!["10.0.0.1".into(), "fd00::1".into()];
        assert_eq!(of(&spec).into_iter().collect::<Vec<_>>(), expected);
        assert!(of(&json!({"clusterIP": "None", "clusterIPs": ["None"]})).is_empty());
    }
}

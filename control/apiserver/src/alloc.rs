//! Owns the cluster IPs and node ports of Services: taken and given back in the transaction that writes the Service.
//!
//! A cluster IP is an IPAddress object of that name, as upstream's; a node port is a key of its own. Both must be
//! absent when the Service is written, so two Services never get the same one, whatever races.

use crate::api::{Api, store_failure};
use crate::cache::object_value_bytes;
use crate::config::Network;
use crate::registry::Extra;
use bytes::Bytes;
use rand::RngExt;
use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::net::IpAddr;
use weft_control_api::field::{FieldError, FieldPath};
use weft_control_api::kinds::Kind;
use weft_control_api::status::Status;
use weft_control_store::{Condition, Op, Range, Revision};

/// Keys of taken node ports.
const NODE_PORTS: &str = "/allocations/nodeports/";
/// Keys of cluster IPs: IPAddress objects.
const ADDRESSES: &str = "/registry/networking.k8s.io/ipaddresses/";
/// Random tries before all addresses are looked through.
const RANDOM_TRIES: usize = 32;

fn is_service(kind: &Kind) -> bool {
    kind.group.is_empty() && kind.kind == "Service"
}

fn text<'a>(object: &'a Value, key: &str) -> &'a str {
    object[key].as_str().unwrap_or_default()
}

fn invalid(service: &Value, error: FieldError) -> Status {
    let kind = weft_control_api::status::GroupKind { group: "", kind: "Service" };
    Status::invalid(kind, text(&service["metadata"], "name"), vec![error])
}

fn has_cluster_ip(spec: &Value) -> bool {
    text(spec, "type") != "ExternalName" && text(spec, "clusterIP") != "None"
}

fn has_node_ports(spec: &Value) -> bool {
    match text(spec, "type") {
        "NodePort" => true,
        "LoadBalancer" => spec["allocateLoadBalancerNodePorts"] != false,
        _ => false,
    }
}

fn needs_health_port(spec: &Value) -> bool {
    text(spec, "type") == "LoadBalancer" && text(spec, "externalTrafficPolicy") == "Local"
}

fn addresses(spec: &Value) -> BTreeSet<String> {
    let list = spec["clusterIPs"].as_array().into_iter().flatten();
    list.chain(std::iter::once(&spec["clusterIP"]))
        .filter_map(Value::as_str)
        .filter(|ip| !ip.is_empty() && *ip != "None")
        .map(str::to_owned)
        .collect()
}

fn ports(spec: &Value) -> BTreeSet<u16> {
    let list = spec["ports"].as_array().into_iter().flatten().map(|port| &port["nodePort"]);
    list.chain(std::iter::once(&spec["healthCheckNodePort"]))
        .filter_map(Value::as_u64)
        .filter_map(|port| u16::try_from(port).ok())
        .filter(|port| *port != 0)
        .collect()
}

/// Gives a new Service what it needs.
pub(crate) async fn on_create(
    api: &Api,
    kind: &Kind,
    object: &mut Value,
    extra: &mut Extra,
) -> Result<(), Status> {
    if !is_service(kind) {
        return Ok(());
    }
    set_families(api, object)?;
    take_address(api, object, &BTreeSet::new(), extra)?;
    take_ports(api, object, &BTreeSet::new(), extra).await
}

/// Gives a changed Service what it needs now, and takes back what it doesn't.
pub(crate) async fn on_update(
    api: &Api,
    kind: &Kind,
    new: &mut Value,
    old: &Value,
    extra: &mut Extra,
) -> Result<(), Status> {
    if !is_service(kind) {
        return Ok(());
    }
    drop_what_the_type_forbids(new, &old["spec"]);
    set_families(api, new)?;
    let (had_addresses, had_ports) = (addresses(&old["spec"]), ports(&old["spec"]));
    take_address(api, new, &had_addresses, extra)?;
    take_ports(api, new, &had_ports, extra).await?;
    let (addresses, ports) = (addresses(&new["spec"]), ports(&new["spec"]));
    let gone = had_addresses.difference(&addresses).map(|ip| format!("{ADDRESSES}{ip}"));
    let gone = gone.chain(had_ports.difference(&ports).map(|port| format!("{NODE_PORTS}{port}")));
    extra.ops.extend(gone.map(|key| Op::Delete { key }));
    Ok(())
}

/// Takes back everything.
pub(crate) fn on_delete(kind: &Kind, object: &Value, extra: &mut Extra) {
    if !is_service(kind) {
        return;
    }
    let keys = addresses(&object["spec"]).into_iter().map(|ip| format!("{ADDRESSES}{ip}"));
    let keys = keys.chain(ports(&object["spec"]).into_iter().map(|port| format!("{NODE_PORTS}{port}")));
    extra.ops.extend(keys.map(|key| Op::Delete { key }));
}

fn is_external(spec: &Value) -> bool {
    matches!(text(spec, "type"), "NodePort" | "LoadBalancer")
        || spec["externalIPs"].as_array().is_some_and(|ips| !ips.is_empty())
}

fn remove_unchanged(spec: &mut serde_json::Map<String, Value>, old: &Value, keys: &[&str]) {
    for key in keys {
        if spec.get(*key) == old.get(*key) {
            spec.remove(*key);
        }
    }
}

/// A client that changes the type and leaves the rest as it was means the rest to go.
fn drop_what_the_type_forbids(new: &mut Value, old: &Value) {
    let Some(spec) = new["spec"].as_object_mut() else { return };
    let now = Value::Object(spec.clone());
    if text(&now, "type") == "ExternalName" && text(old, "type") != "ExternalName" {
        remove_unchanged(spec, old, &["clusterIP", "clusterIPs", "ipFamilies", "ipFamilyPolicy"]);
    }
    if has_node_ports(old) && !has_node_ports(&now) {
        let before = ports(old);
        for port in spec.get_mut("ports").and_then(Value::as_array_mut).into_iter().flatten() {
            let same = port["nodePort"].as_u64().and_then(|p| u16::try_from(p).ok());
            if same.is_some_and(|p| before.contains(&p))
                && let Some(port) = port.as_object_mut()
            {
                port.remove("nodePort");
            }
        }
    }
    if needs_health_port(old)
        && !needs_health_port(&now)
        && now["healthCheckNodePort"] == old["healthCheckNodePort"]
    {
        spec.remove("healthCheckNodePort");
    }
    let balanced = |spec: &Value| text(spec, "type") == "LoadBalancer";
    if balanced(old) && !balanced(&now) {
        remove_unchanged(spec, old, &["allocateLoadBalancerNodePorts", "loadBalancerClass"]);
    }
    if is_external(old) && !is_external(&now) {
        remove_unchanged(spec, old, &["externalTrafficPolicy"]);
    }
}

fn set_families(api: &Api, object: &mut Value) -> Result<(), Status> {
    if text(&object["spec"], "type") == "ExternalName" {
        return Ok(());
    }
    let family = if api.config.service_cidr.is_ipv6() { "IPv6" } else { "IPv4" };
    let path = FieldPath::new("spec");
    if text(&object["spec"], "ipFamilyPolicy") == "RequireDualStack"
        && text(&object["spec"], "clusterIP") != "None"
    {
        let detail = "this cluster is not configured for dual-stack services";
        let error = FieldError::invalid(&path.child("ipFamilyPolicy"), "RequireDualStack", detail);
        return Err(invalid(object, error));
    }
    let families: Vec<String> = object["spec"]["ipFamilies"]
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(|f| f.as_str().map(str::to_owned))
        .collect();
    if let Some(at) = families.iter().position(|f| f != family) {
        let path = path.child("ipFamilies").index(at);
        return Err(invalid(
            object,
            FieldError::invalid(&path, families[at].as_str(), "not configured on this cluster"),
        ));
    }
    if families.is_empty() {
        object["spec"]["ipFamilies"] = json!([family]);
    }
    if text(&object["spec"], "ipFamilyPolicy").is_empty() {
        object["spec"]["ipFamilyPolicy"] = json!("SingleStack");
    }
    Ok(())
}

fn take_address(
    api: &Api,
    object: &mut Value,
    had: &BTreeSet<String>,
    extra: &mut Extra,
) -> Result<(), Status> {
    if !has_cluster_ip(&object["spec"]) {
        return Ok(());
    }
    let taken = |ip: &str| api.cached("networking.k8s.io", "ipaddresses", "", ip).is_some();
    let asked = text(&object["spec"], "clusterIP").to_owned();
    let address = if asked.is_empty() {
        let network = api.config.service_cidr;
        let free = free_address(network, taken)
            .ok_or_else(|| Status::internal("failed to allocate a serviceIP: range is full"))?;
        let address = free.to_string();
        object["spec"]["clusterIP"] = json!(address);
        object["spec"]["clusterIPs"] = json!([address]);
        address
    } else {
        if object["spec"]["clusterIPs"].is_null() {
            object["spec"]["clusterIPs"] = json!([asked]);
        }
        if had.contains(&asked) {
            return Ok(());
        }
        check_address(api, object, &asked, taken(&asked))?;
        asked
    };
    let key = format!("{ADDRESSES}{address}");
    let value = address_object(&address, object, api.config.service_cidr.is_ipv6());
    extra.conditions.push(Condition::Absent(key.clone()));
    extra.ops.push(Op::Put { key, value: object_value_bytes(&value) });
    Ok(())
}

fn check_address(api: &Api, object: &Value, asked: &str, taken: bool) -> Result<(), Status> {
    let network = api.config.service_cidr;
    let in_range = asked.parse::<IpAddr>().is_ok_and(|ip| network.contains(ip));
    let detail = if !in_range {
        format!(
            "failed to allocate IP {asked}: the provided IP ({asked}) is not in the valid range. The range of \
             valid IPs is {network}"
        )
    } else if taken {
        format!("failed to allocate IP {asked}: provided IP is already allocated")
    } else {
        return Ok(());
    };
    let path = FieldPath::new("spec.clusterIPs");
    Err(invalid(object, FieldError::invalid(&path, object["spec"]["clusterIPs"].clone(), detail)))
}

/// An IPAddress object, as upstream's allocator makes it.
fn address_object(address: &str, service: &Value, ipv6: bool) -> Value {
    let metadata = &service["metadata"];
    json!({
        "apiVersion": "networking.k8s.io/v1",
        "kind": "IPAddress",
        "metadata": {
            "name": address,
            "uid": uuid::Uuid::new_v4().to_string(),
            "creationTimestamp": crate::registry::now(),
            "labels": {
                "ipaddress.kubernetes.io/ip-family": if ipv6 { "IPv6" } else { "IPv4" },
                "ipaddress.kubernetes.io/managed-by": "ipallocator.k8s.io",
            },
        },
        "spec": {"parentRef": {"group": "", "resource": "services",
            "namespace": metadata["namespace"], "name": metadata["name"]}},
    })
}

/// A free address: a random one above the part that is kept for explicit ones, else the first free one.
fn free_address(network: Network, taken: impl Fn(&str) -> bool) -> Option<IpAddr> {
    // The network's own address and, for IPv4, its broadcast address are never given.
    let last = network.size() - if network.is_ipv6() { 1 } else { 2 };
    // The part for explicit addresses: a sixteenth, at least 16 and at most 256 (KEP-3070).
    let kept = if last < 32 { 0 } else { (last / 16).clamp(16, 256) };
    let mut random = rand::rng();
    for _try in 0..RANDOM_TRIES {
        let candidate = network.nth(random.random_range(kept + 1..=last));
        if !taken(&candidate.to_string()) {
            return Some(candidate);
        }
    }
    (1..=last).rev().map(|offset| network.nth(offset)).find(|candidate| !taken(&candidate.to_string()))
}

async fn take_ports(
    api: &Api,
    object: &mut Value,
    had: &BTreeSet<u16>,
    extra: &mut Extra,
) -> Result<(), Status> {
    let spec = &object["spec"];
    let (node_ports, health) = (has_node_ports(spec), needs_health_port(spec));
    let asked = ports(spec);
    if !node_ports && !health && asked.is_subset(had) {
        return Ok(());
    }
    let mut taken = taken_ports(api).await?;
    check_ports(api, object, &taken, had)?;
    taken.extend(&asked);
    let owner = Bytes::from(format!(
        "{}/{}",
        text(&object["metadata"], "namespace"),
        text(&object["metadata"], "name")
    ));
    let mut claim = |port: u16| {
        let key = format!("{NODE_PORTS}{port}");
        extra.conditions.push(Condition::Absent(key.clone()));
        extra.ops.push(Op::Put { key, value: owner.clone() });
    };
    asked.difference(had).copied().for_each(&mut claim);
    let full = || Status::internal("failed to allocate a nodePort: range is full");
    if node_ports {
        for port in object["spec"]["ports"].as_array_mut().into_iter().flatten() {
            if port["nodePort"].as_u64().unwrap_or(0) == 0 {
                let free = free_port(api, &mut taken).ok_or_else(full)?;
                port["nodePort"] = json!(free);
                claim(free);
            }
        }
    }
    if health && object["spec"]["healthCheckNodePort"].as_u64().unwrap_or(0) == 0 {
        let free = free_port(api, &mut taken).ok_or_else(full)?;
        object["spec"]["healthCheckNodePort"] = json!(free);
        claim(free);
    }
    Ok(())
}

async fn taken_ports(api: &Api) -> Result<BTreeSet<u16>, Status> {
    let page = api.store.range(Range::prefix(NODE_PORTS), Revision(0), 0).await.map_err(store_failure)?;
    Ok(page.items.iter().filter_map(|kv| kv.key.strip_prefix(NODE_PORTS)?.parse().ok()).collect())
}

fn check_ports(api: &Api, object: &Value, taken: &BTreeSet<u16>, had: &BTreeSet<u16>) -> Result<(), Status> {
    let range = &api.config.node_port_range;
    for (at, port) in object["spec"]["ports"].as_array().into_iter().flatten().enumerate() {
        let Some(wanted) = port["nodePort"].as_u64().filter(|port| *port != 0) else { continue };
        let number = u16::try_from(wanted).unwrap_or(0);
        let detail = if !range.contains(&number) {
            format!(
                "provided port is not in the valid range. The range of valid ports is {}-{}",
                range.start(),
                range.end()
            )
        } else if taken.contains(&number) && !had.contains(&number) {
            "provided port is already allocated".to_owned()
        } else {
            continue;
        };
        let path = FieldPath::new("spec.ports").index(at).child("nodePort");
        return Err(invalid(object, FieldError::invalid(&path, wanted, detail)));
    }
    Ok(())
}

fn free_port(api: &Api, taken: &mut BTreeSet<u16>) -> Option<u16> {
    let range = api.config.node_port_range.clone();
    let mut random = rand::rng();
    let port = (0..RANDOM_TRIES)
        .map(|_try| random.random_range(range.clone()))
        .find(|port| !taken.contains(port))
        .or_else(|| range.clone().find(|port| !taken.contains(port)))?;
    taken.insert(port);
    Some(port)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_come_from_the_upper_part_first() {
        let network: Network = "10.43.0.0/24".parse().unwrap();
        let given = free_address(network, |_| false).unwrap().to_string();
        assert!(given.rsplit('.').next().unwrap().parse::<u8>().unwrap() > 16);
        assert_eq!(free_address(network, |ip| ip != "10.43.0.3").unwrap().to_string(), "10.43.0.3");
        assert_eq!(free_address(network, |_| true), None);
    }

    #[test]
    fn a_type_change_drops_node_ports() {
        let old = json!({"type": "NodePort", "ports": [{"port": 80, "nodePort": 30080}]});
        let mut new = json!({"spec": {"type": "ClusterIP", "ports": [{"port": 80, "nodePort": 30080}]}});
        drop_what_the_type_forbids(&mut new, &old);
        assert!(ports(&new["spec"]).is_empty());
    }
}

//! Owns node ports: the ports of Services on every node, those of health checks included.

use super::{invalid, text};
use crate::api::{Api, store_failure};
use crate::registry::Extra;
use bytes::Bytes;
use rand::RngExt;
use serde_json::{Value, json};
use std::collections::{BTreeSet, HashMap};
use std::ops::RangeInclusive;
use weft_control_api::field::{FieldError, FieldPath};
use weft_control_api::status::Status;
use weft_control_store::{Condition, Op, Range, Revision};

/// Keys of taken node ports; their value is the Service.
pub(super) const NODE_PORTS: &str = "/allocations/nodeports/";
/// Random tries before all ports are looked through.
const RANDOM_TRIES: usize = 32;

fn allocates(spec: &Value) -> bool {
    match text(spec, "type") {
        "NodePort" => true,
        "LoadBalancer" => spec["allocateLoadBalancerNodePorts"] != false,
        _ => false,
    }
}

fn needs_health_port(spec: &Value) -> bool {
    text(spec, "type") == "LoadBalancer" && text(spec, "externalTrafficPolicy") == "Local"
}

/// Whether a Service is still to get a port.
fn lacks(spec: &Value) -> bool {
    let mut ports = spec["ports"].as_array().into_iter().flatten();
    (allocates(spec) && ports.any(|one| port(&one["nodePort"]).is_none()))
        || (needs_health_port(spec) && port(&spec["healthCheckNodePort"]).is_none())
}

fn port(value: &Value) -> Option<u16> {
    value.as_u64().and_then(|port| u16::try_from(port).ok()).filter(|port| *port != 0)
}

/// The ports that a Service has on every node.
pub(super) fn of(spec: &Value) -> BTreeSet<u16> {
    let list = spec["ports"].as_array().into_iter().flatten().map(|port| &port["nodePort"]);
    list.chain(std::iter::once(&spec["healthCheckNodePort"])).filter_map(port).collect()
}

/// What is known about all ports while one Service's are chosen.
struct Choice<'a> {
    range: RangeInclusive<u16>,
    taken: BTreeSet<u16>,
    had: BTreeSet<u16>,
    owner: Bytes,
    extra: &'a mut Extra,
    /// Claimed for this Service; a port may serve two protocols.
    claimed: BTreeSet<u16>,
}

/// Gives a Service the node ports that it needs, and claims those that it asks for.
pub(super) async fn take(
    api: &Api,
    object: &mut Value,
    old: Option<&Value>,
    extra: &mut Extra,
) -> Result<(), Status> {
    let spec = &object["spec"];
    let had = old.map(of).unwrap_or_default();
    if of(spec).is_subset(&had) && !lacks(spec) {
        return Ok(());
    }
    let mut choice = Choice {
        range: api.config.node_port_range.clone(),
        taken: all(api).await?,
        had,
        owner: owner(object),
        extra,
        claimed: BTreeSet::new(),
    };
    if matches!(text(spec, "type"), "NodePort" | "LoadBalancer") {
        choice.for_ports(object, old.is_none())?;
    }
    if needs_health_port(&object["spec"]) {
        choice.for_health_check(object)?;
    }
    Ok(())
}

/// What the key of a port says.
pub(super) fn owner(service: &Value) -> Bytes {
    let metadata = &service["metadata"];
    Bytes::from(format!("{}/{}", text(metadata, "namespace"), text(metadata, "name")))
}

async fn all(api: &Api) -> Result<BTreeSet<u16>, Status> {
    let page = api.store.range(Range::prefix(NODE_PORTS), Revision(0), 0).await.map_err(store_failure)?;
    Ok(page.items.iter().filter_map(|kv| kv.key.strip_prefix(NODE_PORTS)?.parse().ok()).collect())
}

impl Choice<'_> {
    /// Claims a port that was asked for; why not.
    fn claim_asked(&mut self, asked: u16) -> Result<(), String> {
        if self.had.contains(&asked) || self.claimed.contains(&asked) {
            return Ok(());
        }
        if !self.range.contains(&asked) {
            let (first, last) = (self.range.start(), self.range.end());
            return Err(format!(
                "provided port is not in the valid range. The range of valid ports is {first}-{last}"
            ));
        }
        if self.taken.contains(&asked) {
            return Err("provided port is already allocated".to_owned());
        }
        self.claim(asked);
        Ok(())
    }

    fn claim(&mut self, port: u16) {
        let key = format!("{NODE_PORTS}{port}");
        self.taken.insert(port);
        self.claimed.insert(port);
        self.extra.conditions.push(Condition::Absent(key.clone()));
        self.extra.ops.push(Op::Put { key, value: self.owner.clone() });
    }

    fn claim_free(&mut self) -> Option<u16> {
        let free = free(&self.range, &self.taken)?;
        self.claim(free);
        Some(free)
    }

    /// A new Service serves a port in all its protocols at one node port.
    fn for_ports(&mut self, object: &mut Value, new: bool) -> Result<(), Status> {
        let allocates = allocates(&object["spec"]);
        let mut ports = object["spec"]["ports"].as_array().cloned().unwrap_or_default();
        let mut by_port: HashMap<u64, u16> = HashMap::new();
        for (index, one) in ports.iter().enumerate() {
            let Some(asked) = port(&one["nodePort"]) else { continue };
            by_port.entry(one["port"].as_u64().unwrap_or_default()).or_insert(asked);
            self.claim_asked(asked).map_err(|detail| {
                let path = FieldPath::new("spec.ports").index(index).child("nodePort");
                invalid(object, vec![FieldError::invalid(&path, asked, detail)])
            })?;
        }
        for one in ports.iter_mut().filter(|one| allocates && port(&one["nodePort"]).is_none()) {
            let number = one["port"].as_u64().unwrap_or_default();
            let free = match by_port.get(&number).filter(|_| new) {
                Some(same) => *same,
                None => self
                    .claim_free()
                    .ok_or_else(|| Status::internal("failed to allocate a nodePort: range is full"))?,
            };
            by_port.entry(number).or_insert(free);
            one["nodePort"] = json!(free);
        }
        object["spec"]["ports"] = json!(ports);
        Ok(())
    }

    fn for_health_check(&mut self, object: &mut Value) -> Result<(), Status> {
        if let Some(asked) = port(&object["spec"]["healthCheckNodePort"]) {
            return self.claim_asked(asked).map_err(|detail| {
                Status::internal(format!(
                    "failed to allocate requested HealthCheck NodePort {asked}: {detail}"
                ))
            });
        }
        let free = self
            .claim_free()
            .ok_or_else(|| Status::internal("failed to allocate a HealthCheck NodePort 0: range is full"))?;
        object["spec"]["healthCheckNodePort"] = json!(free);
        Ok(())
    }
}

/// A free port: of the upper part first, since the lower one is kept for those who ask (KEP-3668): a 32nd, at least 16
/// and at most 128.
fn free(range: &RangeInclusive<u16>, taken: &BTreeSet<u16>) -> Option<u16> {
    let size = range.end().saturating_sub(*range.start()).saturating_add(1);
    let kept = if size <= 16 { 0 } else { (size / 32).clamp(16, 128) };
    let dynamic = range.start() + kept..=*range.end();
    let mut random = rand::rng();
    (0..RANDOM_TRIES)
        .map(|_try| random.random_range(dynamic.clone()))
        .find(|port| !taken.contains(port))
        .or_else(|| dynamic.clone().find(|port| !taken.contains(port)))
        .or_else(|| (*range.start()..range.start() + kept).find(|port| !taken.contains(port)))
}

/// Gives back what a Service had and has no more.
pub(super) fn release(old: &Value, has: &BTreeSet<u16>, extra: &mut Extra) {
    let gone = of(old);
    extra.ops.extend(gone.difference(has).map(|port| Op::Delete { key: format!("{NODE_PORTS}{port}") }));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_lower_part_is_kept_for_those_who_ask() {
        let range = 30000..=32767;
        assert!((0..500).all(|_| free(&range, &BTreeSet::new()).unwrap() >= 30086));
        let upper: BTreeSet<u16> = (30086..=32767).collect();
        assert_eq!(free(&range, &upper), Some(30000));
        assert_eq!(free(&range, &(30000..=32767).collect()), None);
        assert!((0..50).all(|_| free(&(30000..=30015), &BTreeSet::new()).is_some()));
        assert_eq!(free(&(30000..=30000), &BTreeSet::new()), Some(30000));
    }
}

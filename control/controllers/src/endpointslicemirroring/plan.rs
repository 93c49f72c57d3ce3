//! Owns the difference between Endpoints and the slices that mirror them. Pure.

use super::MANAGER;
use crate::endpointslice::build::{Port, Ports};
use crate::endpointslice::reconcile::{MANAGED_BY, Plan, TRIGGER_TIME};
use crate::shared::SERVICE_NAME;
use k8s_openapi::api::core::v1::{EndpointAddress, EndpointSubset, Endpoints};
use k8s_openapi::api::discovery::v1::{Endpoint, EndpointConditions, EndpointSlice};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, OwnerReference};
use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

/// Upstream's `--mirroring-max-endpoints-per-subset`.
pub(super) const MAX_ENDPOINTS: usize = 1000;
const LAST_APPLIED: &str = "kubectl.kubernetes.io/last-applied-configuration";

/// Addresses that aren't mirrored.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Skipped {
    /// Because they aren't IP addresses.
    pub(super) invalid: usize,
    /// Because there are too many.
    pub(super) excess: usize,
}

/// Address type and ports; a slice has one of each.
type Key = (String, Ports);

/// What to write; without Endpoints the slices go.
pub(super) fn plan(endpoints: Option<&Endpoints>, slices: &[Arc<EndpointSlice>]) -> (Plan, Skipped) {
    let (mut plan, mut skipped) = (Plan::default(), Skipped::default());
    let mut by_key: BTreeMap<Key, Vec<&Arc<EndpointSlice>>> = BTreeMap::new();
    for slice in slices {
        let ports = Ports::from_slice(slice.ports.as_deref().unwrap_or_default());
        by_key.entry((slice.address_type.clone(), ports)).or_default().push(slice);
    }
    if let Some(endpoints) = endpoints {
        let metadata = metadata(endpoints);
        for (key, wanted) in wanted(endpoints, &mut skipped) {
            let mut present = by_key.remove(&key).unwrap_or_default().into_iter();
            match present.next() {
                Some(slice) => plan.update.extend(updated(slice, &metadata, wanted)),
                None => plan.create.push(EndpointSlice {
                    address_type: key.0,
                    endpoints: Some(wanted),
                    metadata: metadata.clone(),
                    ports: Some(key.1.to_slice()),
                }),
            }
            plan.delete.extend(present.cloned());
        }
    }
    plan.delete.extend(by_key.into_values().flatten().cloned());
    recycle(&mut plan);
    (plan, skipped)
}

/// A slice that goes and one that comes are one write, unless their address types differ, which can't change.
fn recycle(plan: &mut Plan) {
    let mut left = Vec::new();
    for slice in std::mem::take(&mut plan.create) {
        match plan.delete.iter().position(|old| old.address_type == slice.address_type) {
            Some(at) => {
                let mut reused = (*plan.delete.swap_remove(at)).clone();
                adopt(&mut reused.metadata, &slice.metadata);
                reused.endpoints = slice.endpoints;
                reused.ports = slice.ports;
                plan.update.push(reused);
            }
            None => left.push(slice),
        }
    }
    plan.create = left;
}

fn adopt(to: &mut ObjectMeta, from: &ObjectMeta) {
    to.labels.clone_from(&from.labels);
    to.annotations.clone_from(&from.annotations);
    to.owner_references.clone_from(&from.owner_references);
}

/// The slice in its new state, if that differs.
fn updated(slice: &EndpointSlice, metadata: &ObjectMeta, wanted: Vec<Endpoint>) -> Option<EndpointSlice> {
    let mut new = slice.clone();
    adopt(&mut new.metadata, metadata);
    new.endpoints = Some(wanted);
    let said = |slice: &EndpointSlice| slice.metadata.annotations.clone().unwrap_or_default();
    let same = slice.endpoints == new.endpoints
        && slice.metadata.labels == new.metadata.labels
        && said(slice) == said(&new);
    (!same).then_some(new)
}

fn wanted(endpoints: &Endpoints, skipped: &mut Skipped) -> BTreeMap<Key, Vec<Endpoint>> {
    let mut all: BTreeMap<Key, BTreeMap<String, Endpoint>> = BTreeMap::new();
    for subset in endpoints.subsets.iter().flatten() {
        let ports = ports(subset);
        let ready = subset.addresses.iter().flatten().map(|address| (address, true));
        let unready = subset.not_ready_addresses.iter().flatten().map(|address| (address, false));
        let mut room = MAX_ENDPOINTS;
        for (address, ready) in ready.chain(unready) {
            let Ok(ip) = address.ip.parse::<IpAddr>() else {
                skipped.invalid += 1;
                continue;
            };
            if room == 0 {
                skipped.excess += 1;
                continue;
            }
            room -= 1;
            let family = if ip.is_ipv4() { "IPv4" } else { "IPv6" };
            let group = all.entry((family.to_owned(), ports.clone())).or_default();
            if group.len() < MAX_ENDPOINTS {
                group.insert(ip.to_string(), endpoint(address, ip, ready));
            } else {
                skipped.excess += 1;
            }
        }
    }
    all.into_iter().map(|(key, group)| (key, group.into_values().collect())).collect()
}

fn ports(subset: &EndpointSubset) -> Ports {
    let mut ports: Vec<Port> = subset
        .ports
        .iter()
        .flatten()
        .map(|port| Port {
            name: port.name.clone().unwrap_or_default(),
            protocol: port.protocol.clone().unwrap_or_else(|| "TCP".into()),
            port: port.port,
            app_protocol: port.app_protocol.clone(),
        })
        .collect();
    ports.sort();
    Ports(ports)
}

fn endpoint(address: &EndpointAddress, ip: IpAddr, ready: bool) -> Endpoint {
    Endpoint {
        addresses: vec![ip.to_string()],
        conditions: Some(EndpointConditions { ready: Some(ready), ..EndpointConditions::default() }),
        hostname: address.hostname.clone().filter(|name| !name.is_empty()),
        node_name: address.node_name.clone(),
        target_ref: address.target_ref.clone(),
        ..Endpoint::default()
    }
}

fn metadata(endpoints: &Endpoints) -> ObjectMeta {
    let name = endpoints.metadata.name.clone().unwrap_or_default();
    let mut labels = endpoints.metadata.labels.clone().unwrap_or_default();
    labels.insert(SERVICE_NAME.into(), name.clone());
    labels.insert(MANAGED_BY.into(), MANAGER.into());
    let mut annotations = endpoints.metadata.annotations.clone().unwrap_or_default();
    annotations.remove(TRIGGER_TIME);
    annotations.remove(LAST_APPLIED);
    ObjectMeta {
        generate_name: Some(format!("{name}-")),
        namespace: endpoints.metadata.namespace.clone(),
        labels: Some(labels),
        annotations: Some(annotations),
        owner_references: Some(vec![OwnerReference {
            api_version: "v1".into(),
            kind: "Endpoints".into(),
            name,
            uid: endpoints.metadata.uid.clone().unwrap_or_default(),
            controller: Some(true),
            block_owner_deletion: Some(true),
        }]),
        ..ObjectMeta::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn endpoints(subsets: serde_json::Value) -> Endpoints {
        let metadata = json!({"name": "db", "namespace": "default", "uid": "u", "labels": {"a": "b"},
            "annotations": {"note": "x", TRIGGER_TIME: "t", LAST_APPLIED: "{}"}});
        serde_json::from_value(json!({"metadata": metadata, "subsets": subsets})).unwrap()
    }

    fn named(slice: &EndpointSlice) -> Arc<EndpointSlice> {
        let mut slice = slice.clone();
        slice.metadata.name = Some(format!("db-{}", slice.address_type));
        Arc::new(slice)
    }

    #[test]
    fn a_slice_for_each_family_and_set_of_ports() {
        let subsets = json!([
            {"addresses": [{"ip": "10.0.0.1"}, {"ip": "fd00::1", "hostname": "h"}],
             "notReadyAddresses": [{"ip": "10.0.0.2", "nodeName": "n"}, {"ip": "bad"}],
             "ports": [{"name": "sql", "port": 5432, "protocol": "TCP"}]}]);
        let (first, skipped) = plan(Some(&endpoints(subsets.clone())), &[]);
        assert_eq!((first.create.len(), skipped), (2, Skipped { invalid: 1, excess: 0 }));
        let v4 = &first.create[0];
        let ready: Vec<_> =
            v4.endpoints.iter().flatten().map(|e| e.conditions.as_ref().unwrap().ready).collect();
        assert_eq!((v4.address_type.as_str(), ready), ("IPv4", vec![Some(true), Some(false)]));
        let labels = v4.metadata.labels.as_ref().unwrap();
        assert_eq!([&labels["a"], &labels[SERVICE_NAME], &labels[MANAGED_BY]], ["b", "db", MANAGER]);
        let annotations = v4.metadata.annotations.as_ref().unwrap();
        assert_eq!(annotations.keys().collect::<Vec<_>>(), ["note"]);
        let slices: Vec<_> = first.create.iter().map(named).collect();
        assert!(plan(Some(&endpoints(subsets)), &slices).0.is_empty(), "nothing more to do");
        // Other ports: the slices are used again.
        let other = json!([{"addresses": [{"ip": "10.0.0.1"}], "ports": [{"name": "sql", "port": 5433}]}]);
        let (second, _) = plan(Some(&endpoints(other)), &slices);
        assert_eq!((second.create.len(), second.update.len(), second.delete.len()), (0, 1, 1));
        assert_eq!(second.update[0].metadata.name.as_deref(), Some("db-IPv4"));
        assert_eq!(plan(None, &slices).0.delete.len(), 2);
    }

    #[test]
    fn a_thousand_addresses_are_enough() {
        let addresses: Vec<_> =
            (0..1003).map(|n| json!({"ip": format!("10.1.{}.{}", n / 250, n % 250)})).collect();
        let (plan, skipped) = plan(Some(&endpoints(json!([{"addresses": addresses}]))), &[]);
        assert_eq!(plan.create[0].endpoints.as_ref().unwrap().len(), MAX_ENDPOINTS);
        assert_eq!(skipped, Skipped { invalid: 0, excess: 3 });
    }
}

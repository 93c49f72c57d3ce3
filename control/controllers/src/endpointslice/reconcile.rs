//! Owns the difference between a Service's slices and its endpoints: as few and as small writes as it takes.

use super::build::{Group, Ports, WEIGHT, Wanted, is_headless, weight};
use crate::shared::SERVICE_NAME;
use k8s_openapi::api::core::v1::Service;
use k8s_openapi::api::discovery::v1::{Endpoint, EndpointSlice};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, OwnerReference};
use std::collections::BTreeMap;
use std::sync::Arc;

/// Upstream's `--max-endpoints-per-slice`.
pub(crate) const MAX_ENDPOINTS: usize = 100;
pub(crate) const MANAGED_BY: &str = "endpointslice.kubernetes.io/managed-by";
pub(crate) const MANAGER: &str = "endpointslice-controller.k8s.io";
pub(crate) const HEADLESS: &str = "service.kubernetes.io/headless";
pub(crate) const TRIGGER_TIME: &str = "endpoints.kubernetes.io/last-change-trigger-time";

/// What to write.
#[derive(Debug, Default, PartialEq)]
pub(crate) struct Plan {
    pub(crate) create: Vec<EndpointSlice>,
    pub(crate) update: Vec<EndpointSlice>,
    pub(crate) delete: Vec<Arc<EndpointSlice>>,
}

impl Plan {
    pub(crate) fn is_empty(&self) -> bool {
        self.create.is_empty() && self.update.is_empty() && self.delete.is_empty()
    }
}

/// A slice that is there, and what it will hold.
struct Existing {
    slice: Arc<EndpointSlice>,
    endpoints: Vec<Endpoint>,
    changed: bool,
}

/// Plans the writes for one address family.
pub(crate) fn plan(
    service: &Service,
    family: &str,
    slices: &[Arc<EndpointSlice>],
    mut wanted: Wanted,
    trigger_time: Option<&str>,
) -> Plan {
    let mut plan = Plan::default();
    let mut by_group: BTreeMap<Group, Vec<Arc<EndpointSlice>>> = BTreeMap::new();
    for slice in slices {
        let ports = Ports::from_slice(slice.ports.as_deref().unwrap_or_default());
        let group = Group { ports, weight: weight(&slice.metadata) };
        by_group.entry(group).or_default().push(slice.clone());
    }
    if wanted.is_empty() {
        // Readers tell "no endpoints" from "not reconciled yet" by an empty slice.
        wanted.insert(Group { ports: Ports(vec![]), weight: None }, BTreeMap::new());
    }
    for (group, endpoints) in wanted {
        let existing = by_group.remove(&group).unwrap_or_default();
        reconcile_group(service, family, &group, (existing, endpoints), &mut plan);
    }
    plan.delete.extend(by_group.into_values().flatten());
    for slice in plan.create.iter_mut().chain(&mut plan.update) {
        let annotations = slice.metadata.annotations.get_or_insert_default();
        match trigger_time {
            Some(time) => annotations.insert(TRIGGER_TIME.into(), time.into()),
            None => annotations.remove(TRIGGER_TIME),
        };
    }
    plan
}

fn reconcile_group(
    service: &Service,
    family: &str,
    group: &Group,
    (slices, mut wanted): (Vec<Arc<EndpointSlice>>, BTreeMap<String, Endpoint>),
    plan: &mut Plan,
) {
    let mut existing: Vec<_> = slices.into_iter().map(|slice| keep(service, slice, &mut wanted)).collect();
    let mut left: Vec<Endpoint> = wanted.into_values().collect();
    fill(&mut existing, &mut left);
    let nothing_new = left.is_empty();
    while !left.is_empty() {
        let rest = left.split_off(left.len().min(MAX_ENDPOINTS));
        plan.create.push(new_slice(service, family, group, std::mem::replace(&mut left, rest)));
    }
    // One empty slice may stay (or come) as the placeholder if there is nothing else.
    let all_empty = nothing_new && existing.iter().all(|e| e.endpoints.is_empty());
    let placeholder = all_empty && group.ports.0.is_empty();
    if placeholder && existing.is_empty() {
        plan.create.push(new_slice(service, family, group, vec![]));
    }
    for (at, entry) in existing.into_iter().enumerate() {
        let keep_empty = placeholder && at == 0;
        if entry.endpoints.is_empty() && !keep_empty {
            plan.delete.push(entry.slice);
        } else if entry.changed {
            let mut slice = (*entry.slice).clone();
            slice.endpoints = Some(entry.endpoints);
            let metadata = new_metadata(service);
            slice.metadata.labels = metadata.labels;
            slice.metadata.owner_references = metadata.owner_references;
            plan.update.push(slice);
        }
    }
}

/// Keeps of a slice what is still wanted, in its newest form, and takes that out of `wanted`.
fn keep(service: &Service, slice: Arc<EndpointSlice>, wanted: &mut BTreeMap<String, Endpoint>) -> Existing {
    let have = slice.endpoints.as_deref().unwrap_or_default();
    let mut endpoints = Vec::with_capacity(have.len());
    let mut changed = slice.metadata.labels != new_metadata(service).labels;
    for old in have {
        let uid = old.target_ref.as_ref().and_then(|t| t.uid.as_deref()).unwrap_or_default();
        match wanted.remove(uid) {
            Some(new) => {
                changed |= new != *old;
                endpoints.push(new);
            }
            None => changed = true,
        }
    }
    Existing { slice, endpoints, changed }
}

/// Puts new endpoints into slices that are written anyway, then all the rest into one that has room for it.
fn fill(existing: &mut [Existing], left: &mut Vec<Endpoint>) {
    for entry in existing.iter_mut().filter(|e| e.changed) {
        let room = MAX_ENDPOINTS.saturating_sub(entry.endpoints.len());
        entry.endpoints.extend(left.drain(..room.min(left.len())));
    }
    if left.is_empty() {
        return;
    }
    let rest = left.len() % MAX_ENDPOINTS;
    let fits = |e: &&mut Existing| rest > 0 && e.endpoints.len() + rest <= MAX_ENDPOINTS;
    if let Some(entry) = existing.iter_mut().filter(fits).max_by_key(|e| e.endpoints.len()) {
        entry.endpoints.extend(left.drain(left.len() - rest..));
        entry.changed = true;
    }
}

fn new_metadata(service: &Service) -> ObjectMeta {
    let name = service.metadata.name.clone().unwrap_or_default();
    let mut labels = service.metadata.labels.clone().unwrap_or_default();
    labels.remove(HEADLESS);
    labels.insert(SERVICE_NAME.into(), name.clone());
    labels.insert(MANAGED_BY.into(), MANAGER.into());
    if is_headless(service) {
        labels.insert(HEADLESS.into(), String::new());
    }
    ObjectMeta {
        generate_name: Some(format!("{name}-")),
        namespace: service.metadata.namespace.clone(),
        labels: Some(labels),
        owner_references: Some(vec![OwnerReference {
            api_version: "v1".into(),
            kind: "Service".into(),
            name,
            uid: service.metadata.uid.clone().unwrap_or_default(),
            controller: Some(true),
            block_owner_deletion: Some(true),
        }]),
        ..ObjectMeta::default()
    }
}

fn new_slice(service: &Service, family: &str, group: &Group, endpoints: Vec<Endpoint>) -> EndpointSlice {
    let weight = group.weight.iter().map(|weight| (WEIGHT.to_owned(), weight.clone()));
    let annotations = group.weight.is_some().then(|| weight.collect());
    EndpointSlice {
        address_type: family.into(),
        endpoints: Some(endpoints),
        metadata: ObjectMeta { annotations, ..new_metadata(service) },
        ports: Some(group.ports.to_slice()),
    }
}

#[cfg(test)]
mod tests {
    use super::super::build::tests::{endpoint_pod, node, service};
    use super::super::build::wanted;
    use super::*;
    use k8s_openapi::api::core::v1::Pod;
    use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;

    fn web() -> Service {
        service(IntOrString::Int(8080))
    }

    fn pods(range: std::ops::Range<usize>) -> Vec<Arc<Pod>> {
        range.map(|n| Arc::new(endpoint_pod(&format!("p{n:03}"), &format!("10.42.0.{n}"), true))).collect()
    }

    fn planned(slices: &[Arc<EndpointSlice>], pods: &[Arc<Pod>]) -> Plan {
        let (wanted, _) = wanted(&web(), pods, "IPv4", |_| Some(node("z")));
        plan(&web(), "IPv4", slices, wanted, None)
    }

    /// The slices after a plan was carried out.
    fn carried_out(slices: &[Arc<EndpointSlice>], plan: &Plan, names: &str) -> Vec<Arc<EndpointSlice>> {
        let mut after: Vec<_> = slices.to_vec();
        after.retain(|s| !plan.delete.iter().any(|d| d.metadata.name == s.metadata.name));
        for slice in &mut after {
            if let Some(new) = plan.update.iter().find(|u| u.metadata.name == slice.metadata.name) {
                *slice = Arc::new(new.clone());
            }
        }
        for (n, slice) in plan.create.iter().enumerate() {
            let mut slice = slice.clone();
            slice.metadata.name = Some(format!("web-{names}{n}"));
            after.push(Arc::new(slice));
        }
        after
    }

    fn sizes(slices: &[Arc<EndpointSlice>]) -> Vec<usize> {
        slices.iter().map(|s| s.endpoints.as_ref().unwrap().len()).collect()
    }

    #[test]
    fn a_hundred_endpoints_go_into_a_slice() {
        let first = planned(&[], &pods(0..250));
        let slices = carried_out(&[], &first, "a");
        assert_eq!(sizes(&slices), [100, 100, 50]);
        let labels = slices[0].metadata.labels.as_ref().unwrap();
        assert_eq!(labels[SERVICE_NAME], "web");
        assert_eq!(labels[MANAGED_BY], MANAGER);
        assert_eq!(labels["app"], "web");
        assert!(planned(&slices, &pods(0..250)).is_empty());
    }

    #[test]
    fn one_more_pod_changes_one_slice() {
        let slices = carried_out(&[], &planned(&[], &pods(0..250)), "a");
        let plan = planned(&slices, &pods(0..251));
        assert_eq!((plan.create.len(), plan.update.len(), plan.delete.len()), (0, 1, 0));
        assert_eq!(sizes(&carried_out(&slices, &plan, "b")), [100, 100, 51]);
    }

    #[test]
    fn a_pod_gone_and_a_pod_come_is_one_write() {
        let slices = carried_out(&[], &planned(&[], &pods(0..250)), "a");
        let plan = planned(&slices, &pods(1..251));
        assert_eq!((plan.create.len(), plan.update.len(), plan.delete.len()), (0, 1, 0));
    }

    #[test]
    fn an_empty_service_keeps_one_empty_slice() {
        let plan = planned(&[], &[]);
        assert_eq!(plan.create.len(), 1);
        assert_eq!(plan.create[0].endpoints.as_deref(), Some([].as_slice()));
        let slices = carried_out(&[], &plan, "a");
        assert!(planned(&slices, &[]).is_empty());
        let filled = planned(&slices, &pods(0..1));
        assert_eq!(filled.create.len() + filled.update.len(), 1);
        assert_eq!(filled.delete.len(), 1);
        let slices = carried_out(&slices, &filled, "b");
        let emptied = planned(&slices, &[]);
        assert_eq!(sizes(&carried_out(&slices, &emptied, "c")), [0]);
    }

    #[test]
    fn pods_of_another_weight_have_their_own_slice() {
        let mut all = pods(0..4);
        let slices = carried_out(&[], &planned(&[], &all), "a");
        let weigh = |pod: &mut Arc<Pod>, weight: &str| {
            Arc::make_mut(pod).metadata.annotations = Some([(WEIGHT.to_owned(), weight.to_owned())].into());
        };
        weigh(&mut all[3], "10");
        let plan = planned(&slices, &all);
        assert_eq!((plan.create.len(), plan.update.len(), plan.delete.len()), (1, 1, 0));
        assert_eq!(plan.create[0].metadata.annotations.as_ref().unwrap()[WEIGHT], "10");
        let slices = carried_out(&slices, &plan, "b");
        assert_eq!(sizes(&slices), [3, 1]);
        assert!(planned(&slices, &all).is_empty());
        all.iter_mut().for_each(|pod| weigh(pod, "10"));
        let plan = planned(&slices, &all);
        assert_eq!((plan.create.len(), plan.update.len(), plan.delete.len()), (0, 1, 1));
        assert_eq!(sizes(&carried_out(&slices, &plan, "c")), [4]);
    }

    #[test]
    fn a_label_of_the_service_reaches_its_slices() {
        let slices = carried_out(&[], &planned(&[], &pods(0..3)), "a");
        let mut service = web();
        service.metadata.labels.as_mut().unwrap().insert("tier".into(), "front".into());
        let (wanted, _) = wanted(&service, &pods(0..3), "IPv4", |_| Some(node("z")));
        let plan = plan(&service, "IPv4", &slices, wanted, Some("2026-11-21T04:00:00Z"));
        assert_eq!(plan.update[0].metadata.labels.as_ref().unwrap()["tier"], "front");
        assert_eq!(
            plan.update[0].metadata.annotations.as_ref().unwrap()[TRIGGER_TIME],
            "2026-11-21T04:00:00Z"
        );
    }
}

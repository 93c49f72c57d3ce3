//! Owns amounts of resources: what a pod asks for and what a node has.

use k8s_openapi::api::core::v1::{Container, Pod, PodSpec};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity as ApiQuantity;
use std::collections::BTreeMap;
use weft_control_api::quantity::Quantity;

/// What scoring assumes for a container that asks for nothing, so that such pods don't pile up on one node.
const DEFAULT_CPU_MILLIS: i64 = 100;
const DEFAULT_MEMORY_BYTES: i64 = 200 * 1024 * 1024;

/// Amounts of each resource.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Resources {
    pub(crate) cpu_millis: i64,
    pub(crate) memory_bytes: i64,
    pub(crate) ephemeral_bytes: i64,
    /// Extended resources and huge pages, in units.
    pub(crate) others: BTreeMap<String, i64>,
}

impl Resources {
    /// Reads a resource list. Validation keeps out what is no quantity, so such counts as nothing.
    pub(crate) fn read(list: Option<&BTreeMap<String, ApiQuantity>>) -> Self {
        let mut all = Self::default();
        for (name, amount) in list.into_iter().flatten() {
            let Ok(amount) = amount.0.parse::<Quantity>() else { continue };
            match name.as_str() {
                "cpu" => all.cpu_millis = amount.millis(),
                "memory" => all.memory_bytes = amount.units(),
                "ephemeral-storage" => all.ephemeral_bytes = amount.units(),
                "pods" => {}
                other => {
                    all.others.insert(other.to_owned(), amount.units());
                }
            }
        }
        all
    }

    pub(crate) fn add(&mut self, other: &Self) {
        self.combine(other, |a, b| a.saturating_add(b));
    }

    pub(crate) fn subtract(&mut self, other: &Self) {
        self.combine(other, |a, b| a.saturating_sub(b));
        self.others.retain(|_, amount| *amount != 0);
    }

    fn raise_to(&mut self, other: &Self) {
        self.combine(other, i64::max);
    }

    fn combine(&mut self, other: &Self, with: fn(i64, i64) -> i64) {
        self.cpu_millis = with(self.cpu_millis, other.cpu_millis);
        self.memory_bytes = with(self.memory_bytes, other.memory_bytes);
        self.ephemeral_bytes = with(self.ephemeral_bytes, other.ephemeral_bytes);
        for (name, amount) in &other.others {
            let mine = self.others.entry(name.clone()).or_default();
            *mine = with(*mine, *amount);
        }
    }
}

/// What the scheduler has to find room for, and what it counts with when it scores.
pub(crate) fn requests(pod: &Pod) -> (Resources, Resources) {
    let Some(spec) = &pod.spec else { return Default::default() };
    let exact = total(spec, |c| Resources::read(c.resources.as_ref().and_then(|r| r.requests.as_ref())));
    let scored = total(spec, |c| {
        let mut amounts = Resources::read(c.resources.as_ref().and_then(|r| r.requests.as_ref()));
        let asks = |name| {
            c.resources.as_ref().and_then(|r| r.requests.as_ref()).is_some_and(|r| r.contains_key(name))
        };
        if !asks("cpu") {
            amounts.cpu_millis = DEFAULT_CPU_MILLIS;
        }
        if !asks("memory") {
            amounts.memory_bytes = DEFAULT_MEMORY_BYTES;
        }
        amounts
    });
    (exact, scored)
}

/// The larger of what runs together in the end and what runs together at any step of initialisation, and the
/// overhead (KEP-753, KEP-688); requests of the whole pod count before those of its containers (KEP-2837).
fn total(spec: &PodSpec, of: impl Fn(&Container) -> Resources) -> Resources {
    let (mut sidecars, mut peak) = (Resources::default(), Resources::default());
    for container in spec.init_containers.iter().flatten() {
        let amounts = of(container);
        if container.restart_policy.as_deref() == Some("Always") {
            sidecars.add(&amounts);
            peak.raise_to(&sidecars);
        } else {
            let mut step = sidecars.clone();
            step.add(&amounts);
            peak.raise_to(&step);
        }
    }
    let mut all = sidecars;
    spec.containers.iter().for_each(|c| all.add(&of(c)));
    all.raise_to(&peak);
    if let Some(requests) = spec.resources.as_ref().and_then(|r| r.requests.as_ref()) {
        let whole = Resources::read(Some(requests));
        if requests.contains_key("cpu") {
            all.cpu_millis = whole.cpu_millis;
        }
        if requests.contains_key("memory") {
            all.memory_bytes = whole.memory_bytes;
        }
        all.others.extend(whole.others);
    }
    all.add(&Resources::read(spec.overhead.as_ref()));
    all
}

#[cfg(test)]
mod tests {
    use super::*;
    use k8s_openapi::api::core::v1::ResourceRequirements;

    fn list(cpu: &str, memory: &str) -> BTreeMap<String, ApiQuantity> {
        [("cpu", cpu), ("memory", memory)].map(|(k, v)| (k.to_owned(), ApiQuantity(v.to_owned()))).into()
    }

    fn container(cpu: &str, memory: &str, restart: Option<&str>) -> Container {
        Container {
            resources: Some(ResourceRequirements {
                requests: Some(list(cpu, memory)),
                ..ResourceRequirements::default()
            }),
            restart_policy: restart.map(Into::into),
            ..Container::default()
        }
    }

    #[test]
    fn init_containers_count_by_their_peak_and_sidecars_always() {
        let spec = PodSpec {
            containers: vec![container("100m", "100Mi", None), container("200m", "1", None)],
            init_containers: Some(vec![
                container("50m", "1Mi", Some("Always")),
                container("500m", "10Mi", None),
            ]),
            overhead: Some(list("10m", "0")),
            ..PodSpec::default()
        };
        let (exact, _) = requests(&Pod { spec: Some(spec), ..Pod::default() });
        assert_eq!(exact.cpu_millis, 550 + 10);
        assert_eq!(exact.memory_bytes, 101 * 1024 * 1024 + 1);
    }

    #[test]
    fn a_container_that_asks_for_nothing_is_scored_with_defaults() {
        let spec = PodSpec { containers: vec![Container::default()], ..PodSpec::default() };
        let (exact, scored) = requests(&Pod { spec: Some(spec), ..Pod::default() });
        assert_eq!(exact, Resources::default());
        assert_eq!((scored.cpu_millis, scored.memory_bytes), (100, 200 * 1024 * 1024));
    }
}

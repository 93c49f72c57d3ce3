//! Requests and limits → QoS class, cgroup folder and limits, on upstream's scales. Pure.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{Container, Pod};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use weft_agent_runtime::Resources;

use crate::pod;
use crate::quantity::{milli_of, value_of};

const CPU_PERIOD_US: u64 = 100_000;
/// The kernel's least quota.
const MIN_QUOTA_US: i64 = 1000;
const MIN_SHARES: u64 = 2;
const MAX_SHARES: u64 = 262_144;

/// Quality of service of a pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Qos {
    Guaranteed,
    Burstable,
    BestEffort,
}

impl Qos {
    /// As the API writes it.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Guaranteed => "Guaranteed",
            Self::Burstable => "Burstable",
            Self::BestEffort => "BestEffort",
        }
    }
}

fn request<'a>(container: &'a Container, name: &str) -> Option<&'a Quantity> {
    container.resources.as_ref()?.requests.as_ref()?.get(name)
}

fn limit<'a>(container: &'a Container, name: &str) -> Option<&'a Quantity> {
    container.resources.as_ref()?.limits.as_ref()?.get(name)
}

/// The pod's class: what the API server recorded, else computed.
pub(crate) fn qos(pod: &Pod) -> Qos {
    match pod.status.as_ref().and_then(|s| s.qos_class.as_deref()) {
        Some("Guaranteed") => return Qos::Guaranteed,
        Some("Burstable") => return Qos::Burstable,
        Some("BestEffort") => return Qos::BestEffort,
        _ => {}
    }
    let mut any = false;
    let mut guaranteed = true;
    for (container, _) in pod::all_containers(pod) {
        for name in ["cpu", "memory"] {
            let limit = limit(container, name).map_or(0, milli_of);
            let request = request(container, name).map_or(limit, milli_of);
            any |= limit > 0 || request > 0;
            guaranteed &= limit > 0 && limit == request;
        }
    }
    match (any, guaranteed) {
        (false, _) => Qos::BestEffort,
        (true, true) => Qos::Guaranteed,
        (true, false) => Qos::Burstable,
    }
}

/// The pod's cgroup below the node's.
pub(crate) fn cgroup(pod: &Pod, uid: &str) -> String {
    match qos(pod) {
        Qos::Guaranteed => format!("pod{uid}"),
        Qos::Burstable => format!("burstable/pod{uid}"),
        Qos::BestEffort => format!("besteffort/pod{uid}"),
    }
}

fn shares(milli_cpu: i64) -> u64 {
    let milli = u64::try_from(milli_cpu).unwrap_or(0);
    (milli * 1024 / 1000).clamp(MIN_SHARES, MAX_SHARES)
}

fn quota(milli_cpu: i64) -> i64 {
    (milli_cpu * 100_000 / 1000).max(MIN_QUOTA_US)
}

/// Limits of one container.
pub(crate) fn container(pod: &Pod, container: &Container, node_memory_bytes: u64) -> Resources {
    let cpu_limit = limit(container, "cpu").map(milli_of).filter(|m| *m > 0);
    let cpu_request = request(container, "cpu").map(milli_of).or(cpu_limit).unwrap_or(0);
    let memory = limit(container, "memory").map(value_of).filter(|bytes| *bytes > 0);
    Resources {
        cpu_shares: Some(shares(cpu_request)),
        cpu_quota_us: cpu_limit.map(quota),
        cpu_period_us: cpu_limit.map(|_| CPU_PERIOD_US),
        memory_limit_bytes: memory,
        pids_limit: None,
        oom_score_adj: Some(oom_score_adj(pod, container, node_memory_bytes)),
    }
}

/// Upstream's table: 1000 for best effort, -997 for guaranteed, in between by the share of memory requested.
fn oom_score_adj(pod: &Pod, container: &Container, node_memory_bytes: u64) -> i32 {
    match qos(pod) {
        Qos::Guaranteed => -997,
        Qos::BestEffort => 1000,
        Qos::Burstable => {
            let memory =
                request(container, "memory").or_else(|| limit(container, "memory")).map_or(0, value_of);
            let capacity = i64::try_from(node_memory_bytes.max(1)).unwrap_or(i64::MAX);
            let by_memory = 1000 - (1000_i128 * i128::from(memory) / i128::from(capacity));
            i32::try_from(by_memory.clamp(3, 999)).unwrap_or(999)
        }
    }
}

/// Limits of the whole pod: the sum of its containers where each has one.
pub(crate) fn whole_pod(pod: &Pod) -> Resources {
    let total = requests(pod);
    let limits = |name: &str, read: fn(&Quantity) -> i64| -> Option<i64> {
        let mut sum = 0;
        let mut init_peak = 0;
        for (c, init) in pod::all_containers(pod) {
            let value = limit(c, name).map(read).filter(|v| *v > 0)?;
            if init && !pod::is_sidecar(c) { init_peak = init_peak.max(value) } else { sum += value }
        }
        Some(sum.max(init_peak)).filter(|v| *v > 0)
    };
    let cpu = limits("cpu", milli_of);
    Resources {
        cpu_shares: Some(shares(total.get("cpu").copied().unwrap_or(0))),
        cpu_quota_us: cpu.map(quota),
        cpu_period_us: cpu.map(|_| CPU_PERIOD_US),
        memory_limit_bytes: limits("memory", value_of),
        pids_limit: None,
        oom_score_adj: None,
    }
}

/// What the pod asks of the node: `cpu` in thousandths, the others in whole units. The larger of the sum of what
/// runs together and the peak of the init containers (with the sidecars started before them), plus the overhead.
pub(crate) fn requests(pod: &Pod) -> BTreeMap<String, i64> {
    let read = |c: &Container| -> BTreeMap<String, i64> {
        let mut asked = BTreeMap::new();
        if let Some(resources) = &c.resources {
            for (name, quantity) in
                resources.limits.iter().flatten().chain(resources.requests.iter().flatten())
            {
                asked.insert(
                    name.clone(),
                    if name == "cpu" { milli_of(quantity) } else { value_of(quantity) },
                );
            }
        }
        asked
    };
    let add = |to: &mut BTreeMap<String, i64>, what: &BTreeMap<String, i64>| {
        for (name, value) in what {
            *to.entry(name.clone()).or_default() += value;
        }
    };
    let raise = |to: &mut BTreeMap<String, i64>, what: &BTreeMap<String, i64>| {
        for (name, value) in what {
            let entry = to.entry(name.clone()).or_default();
            *entry = (*entry).max(*value);
        }
    };
    let (mut sidecars, mut peak) = (BTreeMap::new(), BTreeMap::new());
    for c in pod::init_containers(pod) {
        if pod::is_sidecar(c) {
            add(&mut sidecars, &read(c));
            raise(&mut peak, &sidecars.clone());
        } else {
            let mut during = sidecars.clone();
            add(&mut during, &read(c));
            raise(&mut peak, &during);
        }
    }
    let mut total = sidecars;
    for c in pod::containers(pod) {
        add(&mut total, &read(c));
    }
    raise(&mut total, &peak);
    for (name, quantity) in pod::spec(pod).overhead.iter().flatten() {
        *total.entry(name.clone()).or_default() +=
            if name == "cpu" { milli_of(quantity) } else { value_of(quantity) };
    }
    total
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn pod(containers: serde_json::Value, init: serde_json::Value) -> Pod {
        serde_json::from_value(json!({"metadata": {"uid": "u"},
            "spec": {"containers": containers, "initContainers": init}}))
        .unwrap()
    }

    #[test]
    fn classes_follow_requests_and_limits() {
        let res = |r: serde_json::Value| json!([{"name": "a", "resources": r}]);
        let class = |r| qos(&pod(res(r), json!([])));
        assert_eq!(class(json!({})), Qos::BestEffort);
        assert_eq!(class(json!({"requests": {"cpu": "1"}})), Qos::Burstable);
        assert_eq!(class(json!({"limits": {"cpu": "1", "memory": "1Mi"}})), Qos::Guaranteed);
        assert_eq!(
            class(json!({"limits": {"cpu": "1", "memory": "2Mi"}, "requests": {"memory": "1Mi"}})),
            Qos::Burstable
        );
    }

    #[test]
    fn limits_become_shares_quota_and_bytes() {
        let p = pod(
            json!([{"name": "a", "resources":
            {"requests": {"cpu": "250m", "memory": "64Mi"}, "limits": {"cpu": "500m", "memory": "128Mi"}}}]),
            json!([]),
        );
        let r = container(&p, &pod::containers(&p)[0], 1 << 30);
        assert_eq!(
            (r.cpu_shares, r.cpu_quota_us, r.memory_limit_bytes),
            (Some(256), Some(50_000), Some(128 << 20))
        );
        assert_eq!(r.oom_score_adj, Some(1000 - 62));
        assert_eq!(cgroup(&p, "u"), "burstable/podu");
    }

    #[test]
    fn a_pod_asks_for_the_peak_of_its_init_containers() {
        let p = pod(
            json!([{"name": "a", "resources": {"requests": {"cpu": "100m"}}}]),
            json!([{"name": "side", "restartPolicy": "Always", "resources": {"requests": {"cpu": "50m"}}},
                   {"name": "i", "resources": {"requests": {"cpu": "2"}}}]),
        );
        assert_eq!(requests(&p)["cpu"], 2050);
    }
}

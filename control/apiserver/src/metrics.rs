//! Owns the server's metrics, under upstream's names.

use crate::request_info::RequestInfo;
use http::StatusCode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;
use std::sync::Arc;
use std::time::Duration;

type Labels = Vec<(&'static str, String)>;

/// Upper bounds of request durations, in seconds.
const BUCKETS: [f64; 14] = [0.005, 0.025, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 1.0, 2.0, 5.0, 15.0, 30.0, 60.0];

/// The server's metrics.
pub(crate) struct Metrics {
    registry: Registry,
    requests: Family<Labels, Counter>,
    durations: Family<Labels, Histogram, fn() -> Histogram>,
    in_flight: Family<Labels, Gauge>,
    objects: Family<Labels, Gauge>,
    allocated: Family<Labels, Gauge>,
    available: Family<Labels, Gauge>,
}

/// Counts a request as long as it is being answered.
pub(crate) struct InFlight(Arc<Gauge>);

impl Drop for InFlight {
    fn drop(&mut self) {
        self.0.dec();
    }
}

fn histogram() -> Histogram {
    Histogram::new(BUCKETS)
}

impl Default for Metrics {
    fn default() -> Self {
        Self::new()
    }
}

impl Metrics {
    /// Metrics without a value yet.
    pub(crate) fn new() -> Self {
        let mut registry = Registry::default();
        let requests = Family::default();
        let durations = Family::new_with_constructor(histogram as fn() -> Histogram);
        let in_flight = Family::default();
        let objects = Family::default();
        registry.register("apiserver_request", "Requests by verb, resource and code", requests.clone());
        registry.register(
            "apiserver_request_duration_seconds",
            "Time until the answer began, in seconds",
            durations.clone(),
        );
        registry.register(
            "apiserver_current_inflight_requests",
            "Requests that are being answered",
            in_flight.clone(),
        );
        registry.register("apiserver_storage_objects", "Stored objects by resource", objects.clone());
        let (allocated, available) = (Family::default(), Family::default());
        registry.register(
            "kube_apiserver_clusterip_allocator_allocated_ips",
            "Cluster IPs in use by range",
            allocated.clone(),
        );
        registry.register(
            "kube_apiserver_clusterip_allocator_available_ips",
            "Free cluster IPs by range",
            available.clone(),
        );
        Self { registry, requests, durations, in_flight, objects, allocated, available }
    }

    /// Counts a request that begins.
    pub(crate) fn begin(&self, info: &RequestInfo) -> InFlight {
        let kind = if info.is_read_only() { "readOnly" } else { "mutating" };
        let gauge = self.in_flight.get_or_create_owned(&vec![("request_kind", kind.to_owned())]);
        gauge.inc();
        InFlight(Arc::new(gauge))
    }

    /// Counts a request that was answered.
    pub(crate) fn finish(&self, info: &RequestInfo, code: StatusCode, took: Duration) {
        // Anybody may ask for anything: what no kind has, and no method that HTTP knows, would make labels without bound.
        let method =
            matches!(info.verb.as_str(), "get" | "head" | "post" | "put" | "patch" | "delete" | "options");
        let verb = match (info.is_resource, method) {
            (true, _) => info.verb.to_uppercase(),
            (false, true) => info.verb.clone(),
            (false, false) => "other".to_owned(),
        };
        let scope = match (info.is_resource, info.name.is_empty(), info.namespace.is_empty()) {
            (false, _, _) => "",
            (true, false, _) => "resource",
            (true, true, false) => "namespace",
            (true, true, true) => "cluster",
        };
        let kind = weft_control_api::kinds::find(&info.group, &info.version, &info.resource);
        let known = kind.is_some();
        let resource = if known { info.resource.clone() } else { String::new() };
        let part = kind.is_some_and(|kind| kind.subresource(&info.subresource).is_some());
        let mut labels: Labels = vec![
            ("verb", verb),
            ("group", if known { info.group.clone() } else { String::new() }),
            ("version", if known { info.version.clone() } else { String::new() }),
            ("resource", resource),
            ("subresource", if part { info.subresource.clone() } else { String::new() }),
            ("scope", scope.to_owned()),
            ("component", "apiserver".to_owned()),
        ];
        if !matches!(info.verb.as_str(), "watch") {
            self.durations.get_or_create(&labels).observe(took.as_secs_f64());
        }
        labels.push(("code", code.as_u16().to_string()));
        self.requests.get_or_create(&labels).inc();
    }

    /// Sets how many objects a resource has.
    pub(crate) fn set_objects(&self, resource: String, count: usize) {
        let count = i64::try_from(count).unwrap_or(i64::MAX);
        self.objects.get_or_create(&vec![("resource", resource)]).set(count);
    }

    /// Sets how many addresses each range has given and has left.
    pub(crate) fn set_ranges(&self, ranges: &[(String, u64, u64)]) {
        self.allocated.clear();
        self.available.clear();
        for (cidr, allocated, available) in ranges {
            let labels = vec![("cidr", cidr.clone())];
            let number = |count: u64| i64::try_from(count).unwrap_or(i64::MAX);
            self.allocated.get_or_create(&labels).set(number(*allocated));
            self.available.get_or_create(&labels).set(number(*available));
        }
    }

    /// All metrics as text.
    pub(crate) fn encode(&self) -> Result<String, std::fmt::Error> {
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &self.registry)?;
        Ok(text)
    }
}

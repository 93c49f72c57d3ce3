//! The conformance specs of sig-network of Kubernetes 1.36, each as a test of the same title, beside each other in one cluster of two nodes.
//!
//! `titles.txt` has the titles of all of them. A spec without a test, or with one that is known to fail, stands in [`NOT_YET`]
//! with the reason; what stands there runs with `--ignored`.

mod api;
mod dns;
mod endpoints;
mod reach;
mod services;
mod traffic;

use std::collections::BTreeSet;
use std::io::Write as _;
use std::sync::{Arc, OnceLock};

use futures::future::LocalBoxFuture;
use libtest_mimic::{Arguments, Failed, Trial};
use weft_tests_conformance::{Bed, Site};

/// All titles, one a line.
const TITLES: &str = include_str!("titles.txt");
/// Tests beside each other: most of their time is waiting.
const AT_ONCE: usize = 8;

/// A spec's title and its test.
type Spec = (&'static str, fn(Site) -> LocalBoxFuture<'static, anyhow::Result<()>>);

/// The table from title to test; what stands in brackets in a title is added by [`title`].
macro_rules! specs {
    ($($title:literal => $test:path,)*) => {
        const SPECS: &[Spec] = &[$(($title, |site| Box::pin($test(site)))),*];
    };
}

specs! {
    "API Server should have Endpoints and EndpointSlices pointing to API Server" => endpoints::of_the_api_server,
    "API Server should provide secure master service" => endpoints::secure_master,
    "DNS should provide /etc/hosts entries for the cluster" => dns::hosts_entries,
    "DNS should provide DNS for ExternalName services" => dns::external_name,
    "DNS should provide DNS for pods for Hostname" => dns::pod_hostname,
    "DNS should provide DNS for pods for Subdomain" => dns::pod_subdomain,
    "DNS should provide DNS for services" => dns::services,
    "DNS should provide DNS for the cluster" => dns::cluster,
    "DNS should resolve DNS of partial qualified names for services" => dns::partial_names,
    "DNS should support configurable pod DNS nameservers" => dns::custom_config,
    "EndpointSlice should create Endpoints and EndpointSlices for Pods matching a Service" => endpoints::slices_for_pods,
    "EndpointSlice should create and delete EndpointSlices for a Service with a selector that matches no pods" => endpoints::slices_of_nothing,
    "EndpointSlice should support a Service with multiple endpoint IPs specified in multiple EndpointSlices" => endpoints::several_addresses,
    "EndpointSlice should support a Service with multiple ports specified in multiple EndpointSlices" => endpoints::several_ports,
    "EndpointSlice should support creating EndpointSlice API operations" => api::endpoint_slices,
    "EndpointSliceMirroring should mirror a custom Endpoints resource through create update and delete" => endpoints::mirroring,
    "Endpoints should test the lifecycle of an Endpoint" => api::endpoints_lifecycle,
    "EndpointsController should create Endpoints for Pods matching a Service" => endpoints::endpoints_for_pods,
    "EndpointsController should create and delete Endpoints for a Service with a selector that matches no pods" => endpoints::endpoints_of_nothing,
    "HostPort validates that there is no conflict between pods with same hostPort but different hostIP and protocol" => traffic::host_ports,
    "Ingress API should support creating Ingress API operations" => api::ingresses,
    "IngressClass API should support creating IngressClass API operations" => api::ingress_classes,
    "Networking Granular Checks: Pods should function for intra-pod communication: http" => traffic::pod_to_pod_http,
    "Networking Granular Checks: Pods should function for intra-pod communication: udp" => traffic::pod_to_pod_udp,
    "Networking Granular Checks: Pods should function for node-pod communication: http" => traffic::node_to_pod_http,
    "Networking Granular Checks: Pods should function for node-pod communication: udp" => traffic::node_to_pod_udp,
    "Proxy version v1 A set of valid responses are returned for both pod and service Proxy" => traffic::proxy,
    "Proxy version v1 A set of valid responses are returned for both pod and service ProxyWithPath" => traffic::proxy_with_path,
    "Proxy version v1 should proxy through a service and a pod" => traffic::proxy_ports,
    "Service endpoints latency should not be very high" => endpoints::latency,
    "ServiceCIDR and IPAddress API should support IPAddress API operations" => api::ip_addresses,
    "ServiceCIDR and IPAddress API should support ServiceCIDR API operations" => api::service_cidrs,
    "Services should be able to change the type from ClusterIP to ExternalName" => services::cluster_ip_to_external_name,
    "Services should be able to change the type from ExternalName to ClusterIP" => services::external_name_to_cluster_ip,
    "Services should be able to change the type from ExternalName to NodePort" => services::external_name_to_node_port,
    "Services should be able to change the type from NodePort to ExternalName" => services::node_port_to_external_name,
    "Services should be able to create a functioning NodePort service" => services::node_port_service,
    "Services should be able to switch session affinity for NodePort service" => services::switch_affinity_node_port,
    "Services should be able to switch session affinity for service with type clusterIP" => services::switch_affinity_cluster_ip,
    "Services should complete a service status lifecycle" => api::service_status,
    "Services should delete a collection of services" => api::delete_services,
    "Services should find a service from listing all namespaces" => api::find_service,
    "Services should have session affinity work for NodePort service" => services::affinity_node_port,
    "Services should have session affinity work for service with type clusterIP" => services::affinity_cluster_ip,
    "Services should serve a basic endpoint from pods" => endpoints::basic,
    "Services should serve endpoints on same port and different protocols" => services::same_port_two_protocols,
    "Services should serve multiport endpoints from pods" => endpoints::multiport,
}

/// Specs whose test fails, and why.
const NOT_YET: &[(&str, &str)] = &[];

/// A title without the area before it and the tags after it.
fn title(line: &str) -> &str {
    let line = line.strip_prefix("[sig-network] ").unwrap_or(line);
    line.find(" [").map_or(line, |end| &line[..end])
}

/// Every spec has a test and every test a spec; no reason is given for a spec that doesn't exist.
fn complete() -> Result<(), Failed> {
    let titles: BTreeSet<&str> = TITLES.lines().map(title).collect();
    let tested: BTreeSet<&str> = SPECS.iter().map(|(title, _)| *title).collect();
    let excused: BTreeSet<&str> = NOT_YET.iter().map(|(title, _)| *title).collect();
    let missing: Vec<_> = titles.iter().filter(|t| !tested.contains(*t) && !excused.contains(*t)).collect();
    let unknown: Vec<_> = tested.iter().chain(&excused).filter(|t| !titles.contains(*t)).collect();
    if titles.len() == TITLES.lines().count() && missing.is_empty() && unknown.is_empty() {
        return Ok(());
    }
    Err(format!("without a test or a reason: {missing:#?}; of no spec: {unknown:#?}").into())
}

/// Says which specs are left out, here and in the summary of `cargo xtask test`.
fn report_not_yet() {
    let mut log = std::env::var_os("WEFT_SKIP_LOG")
        .and_then(|path| std::fs::OpenOptions::new().append(true).create(true).open(path).ok());
    for (title, reason) in NOT_YET {
        let line = format!("NOT YET {title}: {reason}");
        eprintln!("{line}");
        if let Some(log) = &mut log
            && let Err(error) = writeln!(log, "{line}")
        {
            eprintln!("the list of skipped tests can't be written: {error}");
        }
    }
}

/// The cluster of all tests, started by the first that runs; `None` where it can't be had.
type Shared = Arc<OnceLock<Result<Option<Bed>, String>>>;

fn run(
    shared: &Shared,
    number: usize,
    test: fn(Site) -> LocalBoxFuture<'static, anyhow::Result<()>>,
) -> Result<(), Failed> {
    let bed = shared.get_or_init(|| {
        Bed::start("conformance::network", "conform", &["--nodes", "2"]).map_err(|error| format!("{error:#}"))
    });
    let Some(bed) = bed.as_ref()? else { return Ok(()) };
    let outcome = bed.run(&format!("spec-{number}"), async |site| test(site).await);
    outcome.map_err(|error| format!("{error:#}").into())
}

fn main() {
    let mut arguments = Arguments::from_args();
    arguments.test_threads.get_or_insert(AT_ONCE);
    let shared = Shared::default();
    let mut trials = vec![Trial::test("every spec has a test or a reason", complete)];
    for (number, (title, test)) in SPECS.iter().enumerate() {
        let (shared, excused) = (Arc::clone(&shared), NOT_YET.iter().any(|(name, _)| name == title));
        let trial = Trial::test(*title, move || run(&shared, number + 1, *test));
        trials.push(trial.with_ignored_flag(excused));
    }
    report_not_yet();
    let conclusion = libtest_mimic::run(&arguments, trials);
    // The process ends below without dropping anything: the cluster must be gone by then.
    if let Some(Ok(Some(bed))) = Arc::into_inner(shared).and_then(OnceLock::into_inner) {
        drop(bed);
    }
    conclusion.exit()
}

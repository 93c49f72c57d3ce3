//! Defaults of pods and pod templates.

use serde_json::{Map, Value, json};

use super::super::value::{at, copy, default_object, default_to, default_zero, each, remove, text};

const CONTAINER_LISTS: [&str; 3] = ["initContainers", "containers", "ephemeralContainers"];
const PROBES: [&str; 3] = ["livenessProbe", "readinessProbe", "startupProbe"];
const HOOKS: [&str; 2] = ["postStart", "preStop"];
/// rw-r--r--, of files in volumes made from API objects.
const FILE_MODE: i64 = 0o644;

/// Defaults of a Pod: those of its spec, and those that a template does not get.
pub(in super::super) fn pod(pod: &mut Value) {
    let Some(spec) = default_object(pod, "spec") else { return };
    pod_spec(spec);
    default_to(spec, "enableServiceLinks", true);
    let host_network = spec["hostNetwork"] == true;
    for list in ["containers", "initContainers"] {
        for container in each(spec, list) {
            requests_from_limits(container);
            if host_network {
                host_ports(container);
            }
        }
    }
    pod_level_requests(spec);
    default_object(pod, "status");
}

/// Defaults of the template in an object at `path`. Upstream's types hold templates by value, so that there always is one.
pub(in super::super) fn template(object: &mut Value, path: &[&str]) {
    let template = path.iter().try_fold(object, |object, field| default_object(object, field));
    if let Some(spec) = template.and_then(|template| default_object(template, "spec")) {
        pod_spec(spec);
    }
}

/// Defaults that pods and templates share.
fn pod_spec(spec: &mut Value) {
    default_zero(spec, "restartPolicy", "Always");
    default_zero(spec, "dnsPolicy", "ClusterFirst");
    default_zero(spec, "schedulerName", "default-scheduler");
    default_to(spec, "terminationGracePeriodSeconds", 30);
    default_object(spec, "securityContext");
    service_account(spec);
    for list in CONTAINER_LISTS {
        each(spec, list).for_each(container);
    }
    each(spec, "volumes").for_each(volume);
    for constraint in each(spec, "topologySpreadConstraints") {
        default_to(constraint, "nodeAffinityPolicy", "Honor");
        default_to(constraint, "nodeTaintsPolicy", "Ignore");
    }
    if let Some(overhead) = spec.get_mut("overhead") {
        round_up_to_milli(overhead);
    }
}

/// `serviceAccount` is the older name of `serviceAccountName`; both are kept equal.
fn service_account(spec: &mut Value) {
    if text(&spec["serviceAccountName"]).is_empty() {
        if text(&spec["serviceAccount"]).is_empty() {
            return;
        }
        let name = spec["serviceAccount"].clone();
        default_zero(spec, "serviceAccountName", name);
    }
    let name = json!({"serviceAccount": spec["serviceAccountName"]});
    copy(spec, &name, "serviceAccount");
}

fn container(container: &mut Value) {
    let policy = pull_policy(text(&container["image"]));
    default_zero(container, "imagePullPolicy", policy);
    default_zero(container, "terminationMessagePath", "/dev/termination-log");
    default_zero(container, "terminationMessagePolicy", "File");
    if let Some(resources) = default_object(container, "resources") {
        for list in ["limits", "requests"] {
            if let Some(list) = resources.get_mut(list) {
                round_up_to_milli(list);
            }
        }
    }
    for port in each(container, "ports") {
        default_zero(port, "protocol", "TCP");
    }
    for variable in each(container, "env") {
        if let Some(field) = at(variable, &["valueFrom", "fieldRef"]) {
            default_zero(field, "apiVersion", "v1");
        }
        if let Some(file) = at(variable, &["valueFrom", "fileKeyRef"]) {
            default_to(file, "optional", false);
        }
    }
    for name in PROBES {
        if let Some(probe) = at(container, &[name]) {
            probe_defaults(probe);
        }
    }
    for hook in HOOKS {
        if let Some(get) = at(container, &["lifecycle", hook, "httpGet"]) {
            http_get(get);
        }
    }
}

/// On the host's network a port is a host port.
fn host_ports(container: &mut Value) {
    for port in each(container, "ports") {
        let number = port["containerPort"].clone();
        default_zero(port, "hostPort", number);
    }
}

/// Images without tag and digest, or with the tag `latest`, are pulled each time.
fn pull_policy(image: &str) -> &'static str {
    let (name, digest) = image.split_once('@').map_or((image, None), |(name, digest)| (name, Some(digest)));
    let last = name.rsplit('/').next().unwrap_or_default();
    match (last.split_once(':'), digest) {
        (Some((_, "latest")), _) => "Always",
        (None, None) if !last.is_empty() => "Always",
        (Some(_) | None, _) => "IfNotPresent",
    }
}

fn probe_defaults(probe: &mut Value) {
    for (field, value) in
        [("timeoutSeconds", 1), ("periodSeconds", 10), ("successThreshold", 1), ("failureThreshold", 3)]
    {
        default_zero(probe, field, value);
    }
    if let Some(get) = at(probe, &["httpGet"]) {
        http_get(get);
    }
    if let Some(grpc) = at(probe, &["grpc"]) {
        default_to(grpc, "service", "");
    }
}

fn http_get(get: &mut Value) {
    default_zero(get, "path", "/");
    default_zero(get, "scheme", "HTTP");
}

fn volume(volume: &mut Value) {
    let sources = volume
        .as_object()
        .map(|map| map.iter().filter(|(key, value)| *key != "name" && !value.is_null()).count());
    if sources == Some(0) {
        default_object(volume, "emptyDir");
    }
    for source in ["secret", "configMap", "downwardAPI", "projected"] {
        if let Some(source) = at(volume, &[source]) {
            default_to(source, "defaultMode", FILE_MODE);
        }
    }
    if let Some(source) = at(volume, &["downwardAPI"]) {
        downward_items(source);
    }
    if let Some(projected) = at(volume, &["projected"]) {
        for source in each(projected, "sources") {
            if let Some(token) = at(source, &["serviceAccountToken"]) {
                default_to(token, "expirationSeconds", 3600);
            }
            if let Some(downward) = at(source, &["downwardAPI"]) {
                downward_items(downward);
            }
        }
    }
    if let Some(path) = at(volume, &["hostPath"]) {
        default_to(path, "type", "");
    }
    if let Some(claim) = at(volume, &["ephemeral", "volumeClaimTemplate", "spec"]) {
        default_to(claim, "volumeMode", "Filesystem");
    }
    if let Some(image) = at(volume, &["image"]) {
        let policy = pull_policy(text(&image["reference"]));
        default_zero(image, "pullPolicy", policy);
    }
    legacy_volume(volume);
}

fn downward_items(source: &mut Value) {
    for item in each(source, "items") {
        if let Some(field) = at(item, &["fieldRef"]) {
            default_zero(field, "apiVersion", "v1");
        }
    }
}

/// Drivers that are gone from the kubelet, but not from the API: field, default.
fn legacy_volume(volume: &mut Value) {
    const ZERO: [(&str, &str, &str); 6] = [
        ("rbd", "pool", "rbd"),
        ("rbd", "user", "admin"),
        ("rbd", "keyring", "/etc/ceph/keyring"),
        ("iscsi", "iscsiInterface", "default"),
        ("scaleIO", "storageMode", "ThinProvisioned"),
        ("scaleIO", "fsType", "xfs"),
    ];
    const POINTER: [(&str, &str, &str); 3] = [
        ("azureDisk", "cachingMode", "ReadWrite"),
        ("azureDisk", "kind", "Shared"),
        ("azureDisk", "fsType", "ext4"),
    ];
    for (source, field, value) in ZERO {
        if let Some(source) = at(volume, &[source]) {
            default_zero(source, field, value);
        }
    }
    for (source, field, value) in POINTER {
        if let Some(source) = at(volume, &[source]) {
            default_to(source, field, value);
        }
    }
    if let Some(disk) = at(volume, &["azureDisk"]) {
        default_to(disk, "readOnly", false);
    }
}

/// A limit without a request is also the request.
fn requests_from_limits(container: &mut Value) {
    let Some(resources) = at(container, &["resources"]) else { return };
    let Some(limits) = resources["limits"].as_object().filter(|limits| !limits.is_empty()).cloned() else {
        return;
    };
    if let Some(Value::Object(requests)) = default_object(resources, "requests") {
        for (name, limit) in limits {
            requests.entry(name).or_insert(limit);
        }
    }
}

/// Resources that may be given for a pod as a whole.
fn is_pod_level(resource: &str) -> bool {
    matches!(resource, "cpu" | "memory") || resource.starts_with("hugepages-")
}

/// A pod-level limit without a request: the sum of the containers' requests if they have any, else the limit.
fn pod_level_requests(spec: &mut Value) {
    let Some(limits) = spec["resources"]["limits"].as_object().cloned() else { return };
    let mut requests = spec["resources"]["requests"].as_object().cloned().unwrap_or_default();
    let missing: Vec<_> =
        ["cpu", "memory"].into_iter().filter(|name| !requests.contains_key(*name)).collect();
    for name in missing {
        if let Some(total) = super::resources::pod_request(spec, name) {
            requests.insert(name.to_owned(), total.into());
        }
    }
    for (name, limit) in limits.iter().filter(|(name, _)| is_pod_level(name)) {
        requests.entry(name.clone()).or_insert_with(|| limit.clone());
    }
    if !requests.is_empty()
        && let Some(resources) = at(spec, &["resources"])
    {
        remove(resources, "requests");
        default_to(resources, "requests", requests);
    }
}

/// The API keeps thousandths of a unit at most: anything finer is rounded up.
fn round_up_to_milli(resources: &mut Value) {
    let Some(map) = resources.as_object_mut() else { return };
    let rounded: Map<String, Value> = map
        .iter()
        .map(|(name, value)| (name.clone(), super::resources::rounded_up_to_milli(value)))
        .collect();
    *map = rounded;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pull_policy_follows_the_tag() {
        let cases = [
            ("nginx", "Always"),
            ("nginx:latest", "Always"),
            ("nginx:1.27", "IfNotPresent"),
            ("localhost:5000/nginx", "Always"),
            ("localhost:5000/a/nginx:1", "IfNotPresent"),
            ("nginx@sha256:0000", "IfNotPresent"),
            ("nginx:latest@sha256:0000", "Always"),
            ("", "IfNotPresent"),
        ];
        for (image, policy) in cases {
            assert_eq!(pull_policy(image), policy, "{image}");
        }
    }
}

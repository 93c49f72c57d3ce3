//! Rows of objects in, upstream's defaults, preparations and messages out.

mod properties;
mod validation;

use jiff::Timestamp;
use serde_json::{Value, json};

use super::*;
use crate::kinds::{self, Kind};

pub(super) fn kind(api_version: &str, name: &str) -> &'static Kind {
    let (group, version) = api_version.split_once('/').unwrap_or(("", api_version));
    kinds::by_gvk(group, version, name).unwrap()
}

pub(super) fn context() -> Context<'static> {
    Context { username: "jane", uid: "u1", groups: &[], extra: &Value::Null, now: Timestamp::UNIX_EPOCH }
}

pub(super) fn of(object: &Value) -> &'static Kind {
    kind(object["apiVersion"].as_str().unwrap(), object["kind"].as_str().unwrap())
}

pub(super) fn defaulted(mut object: Value) -> Value {
    default(of(&object), &mut object);
    object
}

/// Defaults and prepares a new object.
pub(super) fn created(object: Value) -> Value {
    let mut object = defaulted(object);
    prepare_create(of(&object), &mut object, &context());
    object
}

/// Writes `new` over `old`.
pub(super) fn updated(subresource: Option<&str>, new: Value, old: &Value) -> Value {
    let mut new = defaulted(new);
    prepare_update(of(&new), subresource, &mut new, old);
    new
}

pub(super) fn pod(spec: Value) -> Value {
    json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "p", "namespace": "default"}, "spec": spec})
}

pub(super) fn deployment() -> Value {
    json!({
        "apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "d", "namespace": "default"},
        "spec": {
            "selector": {"matchLabels": {"app": "nginx"}},
            "template": {
                "metadata": {"labels": {"app": "nginx"}},
                "spec": {"containers": [{"name": "nginx", "image": "nginx:1.27"}]},
            },
        },
    })
}

pub(super) fn service(spec: Value) -> Value {
    json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": "s", "namespace": "default"}, "spec": spec})
}

#[test]
fn a_pod_gets_upstreams_defaults() {
    let object = defaulted(pod(json!({
        "serviceAccount": "sa", "hostNetwork": true, "overhead": {"cpu": "0.0001"},
        "containers": [{
            "name": "c", "image": "nginx", "ports": [{"containerPort": 80}],
            "resources": {"limits": {"cpu": "1000m", "memory": "1.5Gi"}, "requests": {"cpu": "0.5"}},
            "livenessProbe": {"httpGet": {"port": 80}, "periodSeconds": 5},
            "readinessProbe": {"grpc": {"port": 9}},
            "lifecycle": {"preStop": {"httpGet": {"port": 80}}},
            "env": [{"name": "N", "valueFrom": {"fieldRef": {"fieldPath": "spec.nodeName"}}}],
        }],
        "volumes": [
            {"name": "e"}, {"name": "s", "secret": {"secretName": "x"}}, {"name": "h", "hostPath": {"path": "/"}},
            {"name": "p", "projected": {"sources": [
                {"serviceAccountToken": {"path": "t"}},
                {"downwardAPI": {"items": [{"path": "n", "fieldRef": {"fieldPath": "metadata.name"}}]}},
            ]}},
        ],
    })));
    let spec = json!({
        "serviceAccount": "sa", "serviceAccountName": "sa", "hostNetwork": true, "overhead": {"cpu": "1m"},
        "restartPolicy": "Always", "dnsPolicy": "ClusterFirst", "schedulerName": "default-scheduler",
        "terminationGracePeriodSeconds": 30, "securityContext": {}, "enableServiceLinks": true,
        "containers": [{
            "name": "c", "image": "nginx", "imagePullPolicy": "Always",
            "terminationMessagePath": "/dev/termination-log", "terminationMessagePolicy": "File",
            "ports": [{"containerPort": 80, "hostPort": 80, "protocol": "TCP"}],
            "resources": {"limits": {"cpu": "1", "memory": "1536Mi"}, "requests": {"cpu": "500m", "memory": "1536Mi"}},
            "livenessProbe": {
                "httpGet": {"port": 80, "path": "/", "scheme": "HTTP"},
                "periodSeconds": 5, "timeoutSeconds": 1, "successThreshold": 1, "failureThreshold": 3,
            },
            "readinessProbe": {
                "grpc": {"port": 9, "service": ""},
                "periodSeconds": 10, "timeoutSeconds": 1, "successThreshold": 1, "failureThreshold": 3,
            },
            "lifecycle": {"preStop": {"httpGet": {"port": 80, "path": "/", "scheme": "HTTP"}}},
            "env": [{"name": "N", "valueFrom": {"fieldRef": {"apiVersion": "v1", "fieldPath": "spec.nodeName"}}}],
        }],
        "volumes": [
            {"name": "e", "emptyDir": {}}, {"name": "s", "secret": {"secretName": "x", "defaultMode": 420}},
            {"name": "h", "hostPath": {"path": "/", "type": ""}},
            {"name": "p", "projected": {"defaultMode": 420, "sources": [
                {"serviceAccountToken": {"path": "t", "expirationSeconds": 3600}},
                {"downwardAPI": {"items": [{"path": "n", "fieldRef": {"apiVersion": "v1", "fieldPath": "metadata.name"}}]}},
            ]}},
        ],
    });
    assert_eq!(object["spec"], spec);
}

#[test]
fn a_template_does_not_get_what_only_pods_get() {
    let mut object = deployment();
    object["spec"]["template"]["spec"]["hostNetwork"] = true.into();
    object["spec"]["template"]["spec"]["containers"][0]["ports"] = json!([{"containerPort": 80}]);
    let object = defaulted(object);
    let spec = &object["spec"];
    assert_eq!(spec["replicas"], 1);
    assert_eq!(spec["revisionHistoryLimit"], 10);
    assert_eq!(spec["progressDeadlineSeconds"], 600);
    assert_eq!(
        spec["strategy"],
        json!({"type": "RollingUpdate", "rollingUpdate": {"maxSurge": "25%", "maxUnavailable": "25%"}})
    );
    let pod = &spec["template"]["spec"];
    assert_eq!(pod["containers"][0]["imagePullPolicy"], "IfNotPresent");
    assert_eq!(pod["containers"][0]["resources"], json!({}));
    assert_eq!(pod["containers"][0]["ports"], json!([{"containerPort": 80, "protocol": "TCP"}]));
    assert!(pod["enableServiceLinks"].is_null());
}

#[test]
fn defaults_of_services_and_others() {
    let cases = [
        (
            service(json!({"ports": [{"port": 80}]})),
            "/spec",
            json!({
                "type": "ClusterIP", "sessionAffinity": "None", "internalTrafficPolicy": "Cluster",
                "ports": [{"port": 80, "targetPort": 80, "protocol": "TCP"}],
            }),
        ),
        (
            service(json!({"type": "LoadBalancer", "sessionAffinity": "ClientIP", "ports": []})),
            "/spec",
            json!({
                "type": "LoadBalancer", "sessionAffinity": "ClientIP", "ports": [],
                "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": 10800}},
                "internalTrafficPolicy": "Cluster", "externalTrafficPolicy": "Cluster",
                "allocateLoadBalancerNodePorts": true,
            }),
        ),
        (
            json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "n"}}),
            "/metadata/labels",
            json!({"kubernetes.io/metadata.name": "n"}),
        ),
        (
            json!({
                "apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRoleBinding",
                "roleRef": {"kind": "ClusterRole", "name": "r"},
                "subjects": [{"kind": "User", "name": "u"}, {"kind": "ServiceAccount", "name": "s", "namespace": "n"}],
            }),
            "/subjects",
            json!([
                {"kind": "User", "name": "u", "apiGroup": "rbac.authorization.k8s.io"},
                {"kind": "ServiceAccount", "name": "s", "namespace": "n"},
            ]),
        ),
        (
            json!({"apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy", "spec": {"egress": [{"ports": [{"port": 53}]}]}}),
            "/spec",
            json!({
                "podSelector": {}, "policyTypes": ["Ingress", "Egress"],
                "egress": [{"ports": [{"port": 53, "protocol": "TCP"}]}],
            }),
        ),
        (
            json!({"apiVersion": "batch/v1", "kind": "Job", "spec": {"template": {"metadata": {"labels": {"a": "b"}}}}}),
            "/metadata/labels",
            json!({"a": "b"}),
        ),
        (
            json!({"apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "ports": [{"port": 80}]}),
            "/ports",
            json!([{"port": 80, "name": "", "protocol": "TCP"}]),
        ),
    ];
    for (object, pointer, expected) in cases {
        let object = defaulted(object);
        assert_eq!(object.pointer(pointer), Some(&expected), "{}", object["kind"]);
    }
}

#[test]
fn pods_are_classed_by_their_resources() {
    let with = |resources: Value| {
        created(pod(json!({"containers": [{"name": "c", "image": "i", "resources": resources}]})))
    };
    let cases = [
        (json!({}), "BestEffort"),
        (json!({"requests": {"cpu": "1"}}), "Burstable"),
        (json!({"limits": {"cpu": "1", "memory": "1Gi"}}), "Guaranteed"),
        (json!({"limits": {"cpu": "1", "memory": "1Gi"}, "requests": {"cpu": "1000m"}}), "Guaranteed"),
        (json!({"limits": {"cpu": "1", "memory": "1Gi"}, "requests": {"cpu": "500m"}}), "Burstable"),
        (json!({"limits": {"cpu": "1"}}), "Burstable"),
    ];
    for (resources, class) in cases {
        assert_eq!(
            with(resources.clone())["status"],
            json!({"phase": "Pending", "qosClass": class}),
            "{resources}"
        );
    }
}

#[test]
fn create_drops_what_is_not_the_clients() {
    let mut object = deployment();
    object["status"] = json!({"replicas": 5});
    object["metadata"]["generation"] = 7.into();
    object["metadata"]["deletionTimestamp"] = "2020-01-01T00:00:00Z".into();
    let object = created(object);
    assert_eq!(object["status"], json!({}));
    assert_eq!(object["metadata"], json!({"name": "d", "namespace": "default", "generation": 1}));

    let node = json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": "n"}, "status": {"capacity": {"cpu": "2"}}});
    assert_eq!(created(node)["status"], json!({"capacity": {"cpu": "2"}, "allocatable": {"cpu": "2"}}));

    let namespace = created(json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "n"}}));
    assert_eq!(namespace["spec"], json!({"finalizers": ["kubernetes"]}));
    assert_eq!(namespace["status"], json!({"phase": "Active"}));

    let secret = json!({
        "apiVersion": "v1", "kind": "Secret", "metadata": {"name": "s", "namespace": "n"},
        "data": {"a": "eA==", "b": "eQ=="}, "stringData": {"a": "hello"},
    });
    let secret = created(secret);
    assert_eq!(secret["data"], json!({"a": "aGVsbG8=", "b": "eQ=="}));
    assert!(secret.get("stringData").is_none());

    let job = created(json!({
        "apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "j", "namespace": "n", "uid": "u"},
        "spec": {"template": {"spec": {"containers": []}}},
    }));
    assert_eq!(job["spec"]["selector"], json!({"matchLabels": {"batch.kubernetes.io/controller-uid": "u"}}));
    assert_eq!(
        job["spec"]["template"]["metadata"]["labels"],
        json!({
            "controller-uid": "u", "batch.kubernetes.io/controller-uid": "u",
            "job-name": "j", "batch.kubernetes.io/job-name": "j",
        })
    );
}

#[test]
fn spec_and_status_are_written_apart_and_generation_counts_specs() {
    let old = created(deployment());
    let mut new = old.clone();
    new["spec"]["replicas"] = 3.into();
    new["status"] = json!({"replicas": 9});
    new["metadata"]["labels"] = json!({"a": "b"});

    let main = updated(None, new.clone(), &old);
    assert_eq!((&main["spec"]["replicas"], &main["status"]), (&json!(3), &json!({})));
    assert_eq!(main["metadata"]["generation"], 2);

    let status = updated(Some("status"), new.clone(), &old);
    assert_eq!((&status["spec"]["replicas"], &status["status"]), (&json!(1), &json!({"replicas": 9})));
    assert_eq!(status["metadata"]["generation"], 1);
    assert!(status["metadata"]["labels"].is_null());

    let mut relabelled = old.clone();
    relabelled["metadata"]["labels"] = json!({"a": "b"});
    assert_eq!(updated(None, relabelled, &old)["metadata"]["generation"], 1);
}

#[test]
fn updates_keep_identity_and_addresses() {
    let mut old = created(service(json!({"type": "NodePort", "ports": [{"port": 80}]})));
    old["metadata"]["uid"] = "u".into();
    old["metadata"]["creationTimestamp"] = "2026-01-01T00:00:00Z".into();
    old["spec"]["clusterIP"] = "10.43.0.9".into();
    old["spec"]["clusterIPs"] = json!(["10.43.0.9"]);
    old["spec"]["ipFamilies"] = json!(["IPv4"]);
    old["spec"]["ports"][0]["nodePort"] = 30080.into();
    let new = updated(None, service(json!({"type": "NodePort", "ports": [{"port": 80}]})), &old);
    assert_eq!(new, old);
    let cluster = updated(None, service(json!({"ports": [{"port": 80}]})), &old);
    assert!(cluster["spec"]["ports"][0]["nodePort"].is_null());
    assert_eq!(cluster["spec"]["clusterIP"], "10.43.0.9");
}

#[test]
fn a_service_that_changes_its_type_loses_what_it_no_longer_has() {
    let mut old = created(service(json!({"type": "NodePort", "ports": [{"port": 80}]})));
    old["spec"]["clusterIP"] = "10.43.0.9".into();
    old["spec"]["clusterIPs"] = json!(["10.43.0.9"]);
    old["spec"]["ports"][0]["nodePort"] = 30080.into();
    // As a patch of the type alone leaves it.
    let mut new = old.clone();
    new["spec"]["type"] = "ClusterIP".into();
    let new = updated(None, new, &old);
    assert!(
        new["spec"]["ports"][0].get("nodePort").is_none()
            && new["spec"].get("externalTrafficPolicy").is_none()
    );
    assert_eq!(new["spec"]["clusterIP"], "10.43.0.9");
    assert_eq!(validate_update(of(&new), None, &new, &old), []);

    let mut new = old.clone();
    new["spec"]["type"] = "ExternalName".into();
    new["spec"]["externalName"] = "example.com".into();
    let new = updated(None, new, &old);
    assert!(new["spec"].get("clusterIP").is_none() && new["spec"].get("clusterIPs").is_none());
    assert_eq!(validate_update(of(&new), None, &new, &old), []);
}

#[test]
fn scale_is_read_and_written() {
    let kind = kind("apps/v1", "Deployment");
    let mut object = created(deployment());
    object["metadata"]["resourceVersion"] = "5".into();
    object["status"]["replicas"] = 1.into();
    let mut scale = scale_get(kind, &object);
    assert_eq!(scale["spec"], json!({"replicas": 1}));
    assert_eq!(scale["status"], json!({"replicas": 1, "selector": "app=nginx"}));
    assert_eq!(scale["metadata"], json!({"name": "d", "namespace": "default", "resourceVersion": "5"}));
    scale["spec"] = json!({});
    scale["metadata"]["resourceVersion"] = "6".into();
    scale_set(kind, &mut object, &scale);
    assert_eq!(object["spec"]["replicas"], 0);
    assert_eq!(object["metadata"]["resourceVersion"], "6");
}

#[test]
fn fields_are_selectable() {
    let object = created(pod(json!({"containers": [], "nodeName": "n1"})));
    let fields = selectable_fields(of(&object), &object);
    for (label, value) in [
        ("metadata.name", "p"),
        ("metadata.namespace", "default"),
        ("spec.nodeName", "n1"),
        ("spec.restartPolicy", "Always"),
        ("spec.hostNetwork", "false"),
        ("status.phase", "Pending"),
        ("status.podIP", ""),
    ] {
        assert!(fields.contains(&(label, value.to_owned())), "{label}");
        assert!(field_label_supported(of(&object), label));
    }
    assert!(!field_label_supported(of(&object), "spec.containers"));
    let event = json!({"involvedObject": {"kind": "Pod"}, "reportingComponent": "kubelet"});
    let fields = selectable_fields(kind("v1", "Event"), &event);
    assert!(fields.contains(&("involvedObject.kind", "Pod".to_owned())));
    assert!(fields.contains(&("source", "kubelet".to_owned())));
}

#[test]
fn partial_kinds_exist() {
    for (name, _) in partial_kinds() {
        let (group, kind) = name.rsplit_once('/').unwrap_or(("", name));
        let found = kinds::all().iter().any(|one| one.group == group && (kind == "*" || one.kind == kind));
        assert!(found, "{name}");
    }
}

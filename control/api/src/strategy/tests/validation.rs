//! Upstream's messages, word for word.

use serde_json::{Value, json};

use super::super::*;
use super::{created, deployment, kind, of, pod, service, updated};

fn messages(errors: Vec<crate::field::FieldError>) -> Vec<String> {
    errors.iter().map(ToString::to_string).collect()
}

fn on_create(object: Value) -> Vec<String> {
    let object = created(object);
    messages(validate_create(of(&object), &object))
}

fn on_update(subresource: Option<&str>, old: &Value, change: impl FnOnce(&mut Value)) -> Vec<String> {
    let mut new = old.clone();
    change(&mut new);
    let new = updated(subresource, new, old);
    messages(validate_update(of(&new), subresource, &new, old))
}

fn nginx() -> Value {
    pod(json!({"containers": [{"name": "c", "image": "nginx"}]}))
}

fn set(mut object: Value, pointer: &str, value: Value) -> Value {
    let (parent, field) = pointer.rsplit_once('/').unwrap();
    let target = object.pointer_mut(parent).unwrap();
    target[field] = value;
    object
}

#[test]
fn good_objects_pass() {
    let good = [
        nginx(),
        deployment(),
        service(json!({"ports": [{"port": 80, "name": "http", "targetPort": "http"}]})),
        service(json!({"clusterIP": "None"})),
        service(json!({"type": "ExternalName", "externalName": "example.com."})),
        json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "n"}}),
        json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "c", "namespace": "n"}, "data": {"a.b": "c"}}),
        json!({
            "apiVersion": "apps/v1", "kind": "DaemonSet", "metadata": {"name": "d", "namespace": "n"},
            "spec": deployment()["spec"],
        }),
        json!({
            "apiVersion": "apps/v1", "kind": "StatefulSet", "metadata": {"name": "d", "namespace": "n"},
            "spec": deployment()["spec"],
        }),
        json!({
            "apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "j", "namespace": "n", "uid": "u"},
            "spec": {"template": {"spec": {"restartPolicy": "Never", "containers": [{"name": "c", "image": "i"}]}}},
        }),
        json!({
            "apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRoleBinding", "metadata": {"name": "system:x"},
            "roleRef": {"kind": "ClusterRole", "name": "system:x"}, "subjects": [{"kind": "Group", "name": "g"}],
        }),
        json!({
            "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "metadata": {"name": "e", "namespace": "n"},
            "addressType": "IPv4", "endpoints": [{"addresses": ["10.42.0.5"]}], "ports": [{"port": 80}],
        }),
        json!({
            "apiVersion": "v1", "kind": "Event", "metadata": {"name": "e", "namespace": "default"},
            "involvedObject": {"kind": "Node", "name": "n"}, "reason": "Starting", "type": "Normal",
        }),
        json!({"apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": {"name": "l", "namespace": "n"}}),
    ];
    for object in good {
        assert_eq!(on_create(object.clone()), Vec::<String>::new(), "{object}");
    }
}

#[test]
fn metadata_messages() {
    let map = |metadata: Value| json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata});
    let cases = [
        (map(json!({"namespace": "n"})), "metadata.name: Required value: name or generateName is required"),
        (map(json!({"name": "a"})), "metadata.namespace: Required value"),
        (
            map(json!({"name": "A", "namespace": "n"})),
            "metadata.name: Invalid value: \"A\": a lowercase RFC 1123 subdomain must consist of lower case alphanumeric \
             characters, '-' or '.', and must start and end with an alphanumeric character (e.g. 'example.com', regex used for \
             validation is '[a-z0-9]([-a-z0-9]*[a-z0-9])?(\\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*')",
        ),
        (
            map(json!({"name": "a", "namespace": "n", "labels": {"a": "b c"}})),
            "metadata.labels: Invalid value: \"b c\": a valid label must be an empty string or consist of alphanumeric \
             characters, '-', '_' or '.', and must start and end with an alphanumeric character (e.g. 'MyValue',  or \
             'my_value',  or '12345', regex used for validation is '(([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9])?')",
        ),
        (
            map(json!({"name": "a", "namespace": "n", "annotations": {"a": "x".repeat(262_144)}})),
            "metadata.annotations: Too long: may not be more than 262144 bytes",
        ),
        (
            map(json!({"name": "a", "namespace": "n", "ownerReferences": [
                {"apiVersion": "v1", "kind": "Pod", "name": "a", "uid": "u", "controller": true},
                {"apiVersion": "v1", "kind": "Pod", "name": "b", "uid": "v", "controller": true},
            ]})),
            "Only one reference can have Controller set to true. Found \"true\" in references for a and b",
        ),
        (
            json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "n", "namespace": "x"}}),
            "metadata.namespace: Forbidden: not allowed on this type",
        ),
    ];
    for (object, expected) in cases {
        let found = on_create(object);
        assert!(matches!(&found[..], [one] if one.ends_with(expected)), "{expected}: {found:?}");
    }
    assert!(name_problems(kind("v1", "Service"), "1a", false).is_empty());
    let service = name_problems(kind("v1", "Service"), "a.b", false);
    assert!(service[0].starts_with("a lowercase RFC 1123 label must consist of"), "{service:?}");
    assert!(name_problems(kind("v1", "Pod"), "web-", true).is_empty());
    assert!(!name_problems(kind("v1", "Pod"), "web-", false).is_empty());
}

#[test]
fn metadata_may_not_change() {
    let mut old = created(deployment());
    old["metadata"]["uid"] = "u".into();
    let found = on_update(None, &old, |new| new["metadata"]["uid"] = "v".into());
    assert_eq!(found, ["metadata.uid: Invalid value: \"v\": field is immutable"]);
    old["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z".into();
    let found = on_update(None, &old, |new| new["metadata"]["finalizers"] = json!(["a.b/c"]));
    assert_eq!(
        found,
        [
            "metadata.finalizers: Forbidden: no new finalizers can be added if the object is being deleted, found new finalizers []string{\"a.b/c\"}"
        ]
    );
}

#[test]
fn container_messages() {
    let with = |pointer: &str, value: Value| set(nginx(), pointer, value);
    let container = "/spec/containers/0";
    let cases = [
        (pod(json!({})), "spec.containers: Required value"),
        (with("/spec/containers/0/name", "".into()), "spec.containers[0].name: Required value"),
        (with("/spec/containers/0/image", "".into()), "spec.containers[0].image: Required value"),
        (
            with("/spec/containers/0/image", " nginx".into()),
            "spec.containers[0].image: Invalid value: \" nginx\": must not have leading or trailing whitespace",
        ),
        (
            with("/spec/containers", json!([{"name": "c", "image": "a"}, {"name": "c", "image": "b"}])),
            "spec.containers[1].name: Duplicate value: \"c\"",
        ),
        (
            with(&format!("{container}/ports"), json!([{"containerPort": 70000}])),
            "spec.containers[0].ports[0].containerPort: Invalid value: 70000: must be between 1 and 65535, inclusive",
        ),
        (
            with(
                &format!("{container}/resources"),
                json!({"requests": {"cpu": "2"}, "limits": {"cpu": "1"}}),
            ),
            "spec.containers[0].resources.requests: Invalid value: \"2\": must be less than or equal to cpu limit of 1",
        ),
        (
            with(
                &format!("{container}/resources"),
                json!({"limits": {"memory": "1"}, "requests": {"memory": "-1"}}),
            ),
            "spec.containers[0].resources.requests[memory]: Invalid value: \"-1\": must be greater than or equal to 0",
        ),
        (
            with(&format!("{container}/volumeMounts"), json!([{"name": "v", "mountPath": "/v"}])),
            "spec.containers[0].volumeMounts[0].name: Not found: \"v\"",
        ),
        (
            with(&format!("{container}/livenessProbe"), json!({})),
            "spec.containers[0].livenessProbe: Required value: must specify a handler type",
        ),
        (
            with(
                &format!("{container}/livenessProbe"),
                json!({"exec": {"command": ["a"]}, "successThreshold": 2}),
            ),
            "spec.containers[0].livenessProbe.successThreshold: Invalid value: 2: must be 1",
        ),
        (
            with(&format!("{container}/imagePullPolicy"), "Sometimes".into()),
            "spec.containers[0].imagePullPolicy: Unsupported value: \"Sometimes\": supported values: \"Always\", \"IfNotPresent\", \"Never\"",
        ),
        (
            with(
                &format!("{container}/env"),
                json!([{"name": "A", "valueFrom": {"fieldRef": {"fieldPath": "spec.foo"}}}]),
            ),
            "spec.containers[0].env[0].valueFrom.fieldRef.fieldPath: Invalid value: \"spec.foo\": error converting fieldPath: field label not supported: spec.foo",
        ),
    ];
    for (object, expected) in cases {
        assert_eq!(on_create(object), [expected]);
    }
}

#[test]
fn pod_messages() {
    let with = |pointer: &str, value: Value| set(nginx(), pointer, value);
    let cases = [
        (
            with("/spec/restartPolicy", "Maybe".into()),
            "spec.restartPolicy: Unsupported value: \"Maybe\": supported values: \"Always\", \"Never\", \"OnFailure\"",
        ),
        (
            with("/spec/volumes", json!([{"name": "v", "hostPath": {"path": "/a/../b"}}])),
            "spec.volumes[0].hostPath.path: Invalid value: \"/a/../b\": must not contain '..'",
        ),
        (
            with("/spec/volumes", json!([{"name": "v", "emptyDir": {}}, {"name": "v", "emptyDir": {}}])),
            "spec.volumes[1].name: Duplicate value: \"v\"",
        ),
        (
            with("/spec/tolerations", json!([{"operator": "Equal"}])),
            "spec.tolerations[0].operator: Invalid value: \"Equal\": operator must be Exists when `key` is empty, which means \"match all values and all keys\"",
        ),
        (
            with("/spec/securityContext", json!({"runAsUser": -1})),
            "spec.securityContext.runAsUser: Invalid value: -1: must be between 0 and 2147483647, inclusive",
        ),
        (
            with("/spec/initContainers", json!([{"name": "i", "image": "i", "readinessProbe": {}}])),
            "spec.initContainers[0].readinessProbe: Forbidden: may not be set for init containers without restartPolicy=Always",
        ),
    ];
    for (object, expected) in cases {
        assert_eq!(on_create(object), [expected]);
    }
}

#[test]
fn a_pods_spec_is_almost_fixed() {
    let old = created(nginx());
    let found = on_update(None, &old, |new| new["spec"]["containers"][0]["image"] = "nginx:2".into());
    assert_eq!(found, Vec::<String>::new());
    let found = on_update(None, &old, |new| new["spec"]["tolerations"] = json!([{"operator": "Exists"}]));
    assert_eq!(found, Vec::<String>::new());
    let found = on_update(None, &old, |new| new["spec"]["nodeName"] = "n".into());
    assert_eq!(found.len(), 1);
    assert!(
        found[0].starts_with(
            "spec: Forbidden: pod updates may not change fields other than `spec.containers[*].image`,`spec.initContainers[*].image`,`spec.activeDeadlineSeconds`,`spec.tolerations` (only additions to existing tolerations),`spec.terminationGracePeriodSeconds` (allow it to be set to 1 if it was previously negative)\n"
        ),
        "{found:?}"
    );
    let found = on_update(None, &old, |new| new["spec"]["containers"] = json!([]));
    assert_eq!(found, ["spec.containers: Forbidden: pod updates may not add or remove containers"]);
    // A typed client drops what is false and empty.
    let mut stored = nginx();
    stored["spec"]["hostPID"] = false.into();
    stored["spec"]["nodeSelector"] = json!({"a": "b"});
    let stored = created(stored);
    let found = on_update(None, &stored, |new| {
        new["spec"].as_object_mut().unwrap().remove("hostPID");
    });
    assert_eq!(found, Vec::<String>::new());
}

#[test]
fn deployment_messages() {
    let with = |pointer: &str, value: Value| set(deployment(), pointer, value);
    let cases = [
        (
            with("/spec/selector", json!({"matchLabels": {"app": "other"}})),
            "spec.template.metadata.labels: Invalid value: {\"app\":\"nginx\"}: `selector` does not match template `labels`",
        ),
        (with("/spec/selector", Value::Null), "spec.selector: Required value"),
        (
            with("/spec/selector", json!({})),
            "spec.selector: Invalid value: {}: empty selector is invalid for deployment",
        ),
        (
            with("/spec/replicas", (-1).into()),
            "spec.replicas: Invalid value: -1: must be greater than or equal to 0",
        ),
        (
            with("/spec/strategy", json!({"rollingUpdate": {"maxSurge": 0, "maxUnavailable": "0%"}})),
            "spec.strategy.rollingUpdate.maxUnavailable: Invalid value: \"0%\": may not be 0 when `maxSurge` is 0",
        ),
        (
            with("/spec/strategy", json!({"type": "Recreate", "rollingUpdate": {}})),
            "spec.strategy.rollingUpdate: Forbidden: may not be specified when strategy `type` is 'Recreate'",
        ),
        (
            with("/spec/template/spec/restartPolicy", "Never".into()),
            "spec.template.spec.restartPolicy: Unsupported value: \"Never\": supported values: \"Always\"",
        ),
        (
            with("/spec/template/spec/containers/0/name", "A_b".into()),
            "spec.template.spec.containers[0].name: Invalid value: \"A_b\": a lowercase RFC 1123 label must consist of lower case alphanumeric characters or '-', and must start and end with an alphanumeric character (e.g. 'my-name',  or '123-abc', regex used for validation is '[a-z0-9]([-a-z0-9]*[a-z0-9])?')",
        ),
    ];
    for (object, expected) in cases {
        assert_eq!(on_create(object), [expected]);
    }
    let found = on_update(None, &created(deployment()), |new| {
        new["spec"]["selector"]["matchLabels"]["app"] = "x".into();
        new["spec"]["template"]["metadata"]["labels"]["app"] = "x".into();
    });
    assert_eq!(
        found,
        ["spec.selector: Invalid value: {\"matchLabels\":{\"app\":\"x\"}}: field is immutable"]
    );
}

#[test]
fn service_messages() {
    let two = json!([{"port": 80, "name": "a"}, {"port": 81}]);
    let cases = [
        (json!({}), "spec.ports: Required value"),
        (json!({"ports": two}), "spec.ports[1].name: Required value"),
        (
            json!({"ports": [{"port": 0, "targetPort": 1}]}),
            "spec.ports[0].port: Invalid value: 0: must be between 1 and 65535, inclusive",
        ),
        (
            json!({"ports": [{"port": 80, "nodePort": 30000}]}),
            "spec.ports[0].nodePort: Forbidden: may not be used when `type` is 'ClusterIP'",
        ),
        (
            json!({"ports": [{"port": 80}], "type": "Foo"}),
            "spec.type: Unsupported value: \"Foo\": supported values: \"ClusterIP\", \"ExternalName\", \"LoadBalancer\", \"NodePort\"",
        ),
        (json!({"type": "ExternalName"}), "spec.externalName: Required value"),
        (
            json!({"ports": [{"port": 80}], "externalTrafficPolicy": "Local"}),
            "spec.externalTrafficPolicy: Invalid value: \"Local\": may only be set for externally-accessible services",
        ),
        (
            json!({"ports": [{"port": 80}], "sessionAffinity": "ClientIP", "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": 86401}}}),
            "spec.sessionAffinityConfig.clientIP.timeoutSeconds: Invalid value: 86401: must be greater than 0 and less than 86400",
        ),
    ];
    for (spec, expected) in cases {
        assert_eq!(on_create(service(spec)), [expected]);
    }
    let mut old = created(service(json!({"clusterIP": "10.43.0.5", "ports": [{"port": 80}]})));
    old["spec"]["ipFamilies"] = json!(["IPv4"]);
    let found = on_update(None, &old, |new| {
        new["spec"]["clusterIP"] = "10.43.0.6".into();
        new["spec"]["clusterIPs"] = json!(["10.43.0.6"]);
    });
    assert_eq!(found, ["spec.clusterIPs[0]: Invalid value: [\"10.43.0.6\"]: may not change once set"]);
}

#[test]
fn other_messages() {
    let cases = [
        (
            json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "c", "namespace": "n"}, "data": {"a/b": ""}}),
            "data[a/b]: Invalid value: \"a/b\": a valid config key must consist of alphanumeric characters, '-', '_' or '.' (e.g. 'key.name',  or 'KEY_NAME',  or 'key-name', regex used for validation is '[-._a-zA-Z0-9]+')",
        ),
        (
            json!({"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "c", "namespace": "n"}, "type": "kubernetes.io/tls", "data": {"tls.crt": ""}}),
            "data[tls.key]: Required value",
        ),
        (
            json!({
                "apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "j", "namespace": "n", "uid": "u"},
                "spec": {"template": {"spec": {"containers": [{"name": "c", "image": "i"}]}}},
            }),
            "spec.template.spec.restartPolicy: Required value: valid values: \"OnFailure\", \"Never\"",
        ),
        (
            json!({
                "apiVersion": "rbac.authorization.k8s.io/v1", "kind": "Role", "metadata": {"name": "r", "namespace": "n"},
                "rules": [{"verbs": ["get"], "apiGroups": [""]}],
            }),
            "rules[0].resources: Required value: resource rules must supply at least one resource",
        ),
        (
            json!({
                "apiVersion": "v1", "kind": "Event", "metadata": {"name": "e", "namespace": "default"},
                "involvedObject": {"namespace": "other"},
            }),
            "involvedObject.namespace: Invalid value: \"other\": does not match event.namespace",
        ),
        (
            json!({
                "apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": {"name": "l", "namespace": "n"},
                "spec": {"leaseDurationSeconds": 0},
            }),
            "spec.leaseDurationSeconds: Invalid value: 0: must be greater than 0",
        ),
    ];
    for (object, expected) in cases {
        assert_eq!(on_create(object), [expected]);
    }
}

#[test]
fn sealed_config_does_not_change() {
    let old = created(json!({
        "apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "c", "namespace": "n"}, "data": {"a": "b"},
        "immutable": true,
    }));
    let found = on_update(None, &old, |new| new["data"]["a"] = "c".into());
    assert_eq!(found, ["data: Forbidden: field is immutable when `immutable` is set"]);
    let found = on_update(None, &old, |new| new["immutable"] = false.into());
    assert_eq!(found, ["immutable: Forbidden: field is immutable when `immutable` is set"]);
}

#[test]
fn what_is_left_out_is_missed_where_it_belongs() {
    let bare = |api_version: &str, kind: &str| json!({"apiVersion": api_version, "kind": kind, "metadata": {"name": "x", "namespace": "n"}});
    let cases = [
        (bare("v1", "Pod"), vec!["spec.containers: Required value"]),
        (bare("v1", "Service"), vec!["spec.ports: Required value"]),
        (
            bare("apps/v1", "Deployment"),
            vec!["spec.selector: Required value", "spec.template.spec.containers: Required value"],
        ),
        (
            bare("v1", "ReplicationController"),
            vec![
                "spec.selector: Required value",
                "spec.replicas: Required value",
                "spec.template: Required value",
            ],
        ),
    ];
    for (object, expected) in cases {
        assert_eq!(on_create(object), expected);
    }
}

#[test]
fn every_mistake_is_reported() {
    let mut object = deployment();
    object["metadata"]["labels"] = json!({"bad key": ""});
    object["spec"]["replicas"] = (-1).into();
    object["spec"]["template"]["spec"]["containers"][0]["image"] = "".into();
    assert_eq!(on_create(object).len(), 3);
}

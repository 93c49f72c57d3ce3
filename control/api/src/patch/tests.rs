//! Tests of patches.
use proptest::prelude::*;
use serde_json::json;

use super::*;
use crate::kinds;

fn kind(group: &str, name: &str) -> &'static kinds::Kind {
    kinds::by_gvk(group, "v1", name).unwrap()
}

fn strategic(current: &Value, patch: &Value) -> Value {
    apply(kind("apps", "Deployment"), PatchType::Strategic, current, patch.to_string().as_bytes()).unwrap()
}

/// A patch to the pod of a Deployment.
fn pod_patch(current: Value, patch: Value) -> Value {
    let wrap = |spec: Value| json!({"spec": {"template": {"spec": spec}}});
    strategic(&wrap(current), &wrap(patch))["spec"]["template"]["spec"].clone()
}

#[test]
fn json_patches() {
    let current = json!({"spec": {"replicas": 1}, "metadata": {"name": "a"}});
    let run = |patch: &str| apply(kind("apps", "Deployment"), PatchType::Json, &current, patch.as_bytes());
    let patch = r#"[{"op":"test","path":"/spec/replicas","value":1},{"op":"replace","path":"/spec/replicas","value":2},
        {"op":"add","path":"/metadata/labels","value":{"a/b":"c"}},{"op":"remove","path":"/metadata/labels/a~1b"}]"#;
    assert_eq!(
        run(patch).unwrap(),
        json!({"spec": {"replicas": 2}, "metadata": {"name": "a", "labels": {}}})
    );
    for (patch, code, reason) in [
        ("[", 400, "BadRequest"),
        ("{}", 400, "BadRequest"),
        (r#"[{"op":"test","path":"/spec/replicas","value":5}]"#, 422, "Invalid"),
        (r#"[{"op":"remove","path":"/spec/none"}]"#, 422, "Invalid"),
        (r#"[{"op":"dance","path":"/spec"}]"#, 422, "Invalid"),
        (&format!("[{}1]", "1,".repeat(10_000)), 413, "RequestEntityTooLarge"),
    ] {
        let status = run(patch).unwrap_err();
        assert_eq!((status.code(), status.reason.as_ref()), (code, reason), "{patch:.80}");
    }
}

#[test]
fn merge_patches() {
    let current =
        json!({"spec": {"replicas": 1, "paused": true}, "metadata": {"labels": {"a": "1", "b": "2"}}});
    let patch = br#"{"spec":{"paused":null,"replicas":3},"metadata":{"labels":{"a":null,"c":"3"}}}"#;
    let patched = apply(kind("apps", "Deployment"), PatchType::Merge, &current, patch).unwrap();
    assert_eq!(patched, json!({"spec": {"replicas": 3}, "metadata": {"labels": {"b": "2", "c": "3"}}}));
}

#[test]
fn results_are_checked() {
    let current = json!({"apiVersion": "apps/v1", "kind": "Deployment", "spec": {"replicas": 1}});
    let run = |patch_type, patch: &str, validation| {
        apply_and_decode(kind("apps", "Deployment"), patch_type, &current, patch.as_bytes(), validation)
    };
    let wrong = r#"{"spec":{"replicas":"x"}}"#;
    let status = run(PatchType::Merge, wrong, FieldValidation::Warn).unwrap_err();
    assert_eq!((status.code(), status.reason.as_ref()), (422, "Invalid"));
    assert_eq!(
        status.message,
        r#" "" is invalid: patch: Invalid value: "{\"spec\":{\"replicas\":\"x\"}}": json: cannot unmarshal string into Go struct field DeploymentSpec.spec.replicas of type int32"#
    );
    let status = run(PatchType::Strategic, wrong, FieldValidation::Warn).unwrap_err();
    assert!(status.message.contains(r#"Invalid value: "map[spec:map[replicas:x]]": json:"#), "{status}");
    let unknown = r#"{"spec":{"foo":1,"paused":true,"paused":false}}"#;
    let warned = run(PatchType::Strategic, unknown, FieldValidation::Warn).unwrap();
    assert_eq!(warned.warnings, [r#"duplicate field "spec.paused""#, r#"unknown field "spec.foo""#]);
    assert_eq!(warned.object["spec"], json!({"replicas": 1, "paused": false}));
    let status = run(PatchType::Strategic, unknown, FieldValidation::Strict).unwrap_err();
    assert!(
        status
            .message
            .ends_with(r#"strict decoding error: duplicate field "spec.paused", unknown field "spec.foo""#)
    );
    assert_eq!(run(PatchType::Merge, r#"{"kind":"Pod"}"#, FieldValidation::Warn).unwrap_err().code(), 400);
}

#[test]
fn lists_merge_by_key() {
    let current =
        json!({"containers": [{"name": "a", "image": "1", "args": ["x", "y"]}, {"name": "b", "image": "1"}]});
    let patch = json!({"containers": [{"name": "b", "image": "2"}, {"name": "c", "image": "3", "tty": null}, {"name": "a", "args": ["z"]}]});
    assert_eq!(
        pod_patch(current, patch),
        json!({"containers": [{"name": "b", "image": "2"}, {"name": "c", "image": "3"},
            {"name": "a", "image": "1", "args": ["z"]}]})
    );
}

#[test]
fn items_of_the_server_keep_their_place() {
    let named = |names: &[&str]| json!({"containers": names.iter().map(|name| json!({"name": name})).collect::<Vec<_>>()});
    // What the patch doesn't list stays in front of what it was in front of.
    assert_eq!(pod_patch(named(&["a", "b", "c"]), named(&["b"])), named(&["a", "b", "c"]));
    assert_eq!(pod_patch(named(&["a", "b", "c"]), named(&["d"])), named(&["d", "a", "b", "c"]));
    assert_eq!(pod_patch(named(&["a", "b", "c"]), named(&["c", "a"])), named(&["b", "c", "a"]));
    let order = json!({"$setElementOrder/containers": [{"name": "c"}, {"name": "a"}, {"name": "d"}],
        "containers": [{"name": "d"}]});
    assert_eq!(pod_patch(named(&["a", "b", "c"]), order), named(&["b", "c", "a", "d"]));
    let order = json!({"$setElementOrder/containers": [{"name": "b"}, {"name": "a"}]});
    assert_eq!(pod_patch(named(&["a", "b"]), order), named(&["b", "a"]));
}

#[test]
fn directives() {
    let current = || {
        json!({"containers": [{"name": "a"}, {"name": "b"}], "nodeSelector": {"x": "1", "y": "2"},
            "volumes": [{"name": "v", "emptyDir": {}}]})
    };
    let patched = |patch: Value| pod_patch(current(), patch);
    assert_eq!(
        patched(json!({"containers": [{"name": "a", "$patch": "delete"}]}))["containers"],
        json!([{"name": "b"}])
    );
    assert_eq!(
        patched(json!({"containers": [{"$patch": "replace"}, {"name": "z"}]}))["containers"],
        json!([{"name": "z"}])
    );
    assert_eq!(
        patched(json!({"nodeSelector": {"$patch": "replace", "z": "3"}}))["nodeSelector"],
        json!({"z": "3"})
    );
    assert_eq!(patched(json!({"nodeSelector": {"$patch": "delete"}}))["nodeSelector"], json!({}));
    assert_eq!(patched(json!({"nodeSelector": null})).get("nodeSelector"), None);
    assert_eq!(
        patched(
            json!({"volumes": [{"name": "v", "hostPath": {"path": "/"}, "$retainKeys": ["name", "hostPath"]}]})
        )["volumes"],
        json!([{"name": "v", "hostPath": {"path": "/"}}])
    );
    let current = json!({"metadata": {"finalizers": ["a", "b", "c"]}});
    let patch = json!({"metadata": {"$deleteFromPrimitiveList/finalizers": ["b"],
        "$setElementOrder/finalizers": ["c", "a", "d"], "finalizers": ["d"]}});
    assert_eq!(strategic(&current, &patch), json!({"metadata": {"finalizers": ["c", "a", "d"]}}));
}

/// What kubectl 1.32 sends for a container that went, one that came and one that changed.
#[test]
fn patch_of_kubectl_apply() {
    let current = json!({"containers": [{"name": "a", "image": "a:1", "tty": true}, {"name": "b"}, {"name": "injected"}]});
    let patch = json!({"$setElementOrder/containers": [{"name": "a"}, {"name": "c"}], "containers": [
        {"image": "a:2", "name": "a"}, {"image": "c:1", "name": "c"}, {"$patch": "delete", "name": "b"}]});
    assert_eq!(
        pod_patch(current, patch),
        json!({"containers": [{"name": "a", "image": "a:2", "tty": true}, {"name": "c", "image": "c:1"},
            {"name": "injected"}]})
    );
}

#[test]
fn refused_patches() {
    let current = json!({"spec": {"template": {"spec": {"containers": [{"name": "a"}]}}}});
    let code = |patch: Value| {
        let patch = json!({"spec": {"template": {"spec": patch}}}).to_string();
        apply(kind("apps", "Deployment"), PatchType::Strategic, &current, patch.as_bytes()).unwrap_err()
    };
    let status = code(json!({"containers": [{"image": "x"}]}));
    assert_eq!(status.message, "map: map[image:x] does not contain declared merge key: name");
    assert_eq!(status.code(), 500);
    assert_eq!(code(json!({"$retainKeys": ["a"], "b": 1})).code(), 400);
    assert_eq!(code(json!({"$patch": "dance"})).message, "unknown patch type found: dance");
    let order = json!({"$setElementOrder/containers": [{"name": "b"}], "containers": [{"name": "a"}]});
    assert_eq!(code(order).code(), 400);
}

#[test]
fn conditions_and_ports_merge() {
    let current = json!({"status": {"conditions": [{"type": "Ready", "status": "True"}]}});
    let patch =
        br#"{"status":{"conditions":[{"type":"Ready","status":"False"},{"type":"New","status":"True"}]}}"#;
    let patched = apply(kind("", "Pod"), PatchType::Strategic, &current, patch).unwrap();
    assert_eq!(
        patched["status"]["conditions"],
        json!([{"type": "Ready", "status": "False"}, {"type": "New", "status": "True"}])
    );
    let current = json!({"spec": {"ports": [{"port": 80, "name": "a"}, {"port": 81}]}});
    let patch = br#"{"spec":{"ports":[{"port":80,"targetPort":8080}]}}"#;
    let patched = apply(kind("", "Service"), PatchType::Strategic, &current, patch).unwrap();
    assert_eq!(
        patched["spec"]["ports"],
        json!([{"port": 80, "name": "a", "targetPort": 8080}, {"port": 81}])
    );
}

fn json_value() -> impl Strategy<Value = Value> {
    let leaf =
        prop_oneof![Just(Value::Null), any::<bool>().prop_map(Value::from), "[a-c]".prop_map(Value::from)];
    leaf.prop_recursive(3, 16, 4, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..3).prop_map(Value::from),
            prop::collection::btree_map("[a-d]", inner, 0..4)
                .prop_map(|fields| Value::Object(fields.into_iter().collect())),
        ]
    })
}

fn containers() -> impl Strategy<Value = Value> {
    prop::collection::btree_map("[a-e]", "[0-9]", 0..5).prop_shuffle_values()
}

trait ShuffleValues: Strategy {
    fn prop_shuffle_values(self) -> impl Strategy<Value = Value>;
}

impl<S: Strategy<Value = std::collections::BTreeMap<String, String>>> ShuffleValues for S {
    fn prop_shuffle_values(self) -> impl Strategy<Value = Value> {
        let items = self.prop_map(|items| {
            items.into_iter().map(|(name, image)| json!({"name": name, "image": image})).collect::<Vec<_>>()
        });
        items.prop_shuffle().prop_map(|items| json!({"containers": items}))
    }
}

proptest! {
    #[test]
    fn merge_patch_is_idempotent(current in json_value(), patch in json_value()) {
        let bytes = patch.to_string();
        let once = apply(kind("", "Pod"), PatchType::Merge, &current, bytes.as_bytes()).unwrap();
        let twice = apply(kind("", "Pod"), PatchType::Merge, &once, bytes.as_bytes()).unwrap();
        prop_assert_eq!(once, twice);
    }

    #[test]
    fn strategic_patch_is_idempotent_and_loses_nothing(current in containers(), patch in containers()) {
        let once = pod_patch(current.clone(), patch.clone());
        prop_assert_eq!(&pod_patch(once.clone(), patch.clone()), &once);
        let names = |spec: &Value| -> std::collections::BTreeSet<String> {
            spec["containers"].as_array().unwrap().iter().map(|c| c["name"].to_string()).collect()
        };
        let expected: std::collections::BTreeSet<_> = names(&current).union(&names(&patch)).cloned().collect();
        prop_assert_eq!(names(&once), expected);
    }

    #[test]
    fn any_patch_is_applied_or_refused(current in json_value(), patch in json_value()) {
        for patch_type in [PatchType::Json, PatchType::Merge, PatchType::Strategic] {
            let bytes = patch.to_string();
            let _ = apply_and_decode(kind("", "Pod"), patch_type, &current, bytes.as_bytes(), FieldValidation::Strict);
        }
    }
}

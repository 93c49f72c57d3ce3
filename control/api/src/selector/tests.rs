//! Tests of selectors.
use proptest::prelude::*;
use serde_json::json;

use super::*;

fn labels(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
    pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
}

#[test]
fn parses_every_operator() {
    let selector = LabelSelector::parse("a=b, c != d,e in (x, y),f notin (z),!g,h,i>1,j<3,k==").unwrap();
    assert_eq!(selector.to_string(), "a=b,c!=d,e in (x,y),f!=z,!g,h,i>1,j<3,k=");
    let good = [("a", "b"), ("e", "y"), ("h", ""), ("i", "2"), ("j", "2"), ("k", "")];
    assert!(selector.matches(&labels(&good)));
    for (key, value) in [("a", "x"), ("c", "d"), ("e", "z"), ("f", "z"), ("g", ""), ("i", "1"), ("j", "x")] {
        let mut bad = labels(&good);
        bad.insert(key.to_owned(), value.to_owned());
        assert!(!selector.matches(&bad), "{key}={value}");
    }
    for missing in ["a", "e", "h", "i", "k"] {
        let mut bad = labels(&good);
        bad.remove(missing);
        assert!(!selector.matches(&bad), "without {missing}");
    }
}

#[test]
fn everything_and_nothing() {
    assert!(LabelSelector::parse("").unwrap().is_everything());
    assert!(LabelSelector::parse(" ").unwrap().matches(&labels(&[])));
    assert!(!LabelSelector::nothing().matches(&labels(&[("a", "b")])));
    assert!(!LabelSelector::from_value(None).unwrap().matches(&labels(&[])));
    assert!(LabelSelector::from_value(Some(&json!({}))).unwrap().matches(&labels(&[])));
}

#[test]
fn reads_label_selector_objects() {
    let selector = json!({"matchLabels": {"app": "web"}, "matchExpressions": [
        {"key": "tier", "operator": "NotIn", "values": ["db"]}, {"key": "x", "operator": "DoesNotExist"}]});
    let selector = LabelSelector::from_value(Some(&selector)).unwrap();
    assert_eq!(selector.to_string(), "app=web,tier!=db,!x");
    let object = json!({"app": "web", "tier": "front"});
    assert!(selector.matches(&object.as_object()));
    assert!(!selector.matches(&None::<&Map<String, Value>>));
    let bad = json!({"matchExpressions": [{"key": "a", "operator": "Near"}]});
    assert_eq!(
        LabelSelector::from_value(Some(&bad)).unwrap_err().to_string(),
        "\"Near\" is not a valid label selector operator"
    );
}

#[test]
fn complains_like_upstream() {
    let error = |text: &str| LabelSelector::parse(text).unwrap_err().to_string();
    assert_eq!(error("a=b,"), "unable to parse requirement: found '', expected: identifier after ','");
    assert_eq!(error("=b"), "unable to parse requirement: found '=', expected: identifier");
    assert_eq!(
        error("a b"),
        "unable to parse requirement: found 'b', expected: in, notin, =, ==, !=, gt, lt"
    );
    assert_eq!(error("a in x"), "unable to parse requirement: found 'x', expected: '('");
    assert!(error("a=b b").ends_with("found 'b', expected: ',' or 'end of string'"));
    assert!(error("a>b").ends_with(
        r#"values: Invalid value: ["b"]: for 'Gt', 'Lt' operators, the value must be an integer"#
    ));
    assert!(
        error("-a=b").starts_with("unable to parse requirement: key: Invalid value: \"-a\": name part must")
    );
    assert!(
        error("a=-b")
            .starts_with("unable to parse requirement: values[0][a]: Invalid value: \"-b\": a valid label")
    );
}

#[test]
fn field_selectors() {
    let selector = FieldSelector::parse(r"metadata.name=web,status.phase!=Running,x==a\,b\=c\\").unwrap();
    assert_eq!(selector.requires_exactly("metadata.name"), Some("web"));
    assert_eq!(selector.requires_exactly("status.phase"), None);
    let fields = vec![("metadata.name", "web"), ("status.phase", "Pending"), ("x", r"a,b=c\")];
    assert!(selector.matches(&fields));
    assert!(!selector.matches(&vec![("metadata.name", "web"), ("status.phase", "Running")]));
    assert_eq!(selector.to_string(), r"metadata.name=web,status.phase!=Running,x=a\,b\=c\\");
    assert!(FieldSelector::parse("").unwrap().is_everything());
    assert_eq!(
        FieldSelector::parse("a=b,nonsense").unwrap_err().to_string(),
        "invalid selector: 'a=b,nonsense'; can't understand 'nonsense'"
    );
    assert!(FieldSelector::parse(r"a=\x").is_err());
}

fn key() -> impl Strategy<Value = String> {
    "[a-z]([a-z0-9]{0,6}[.][a-z0-9])?(/[a-z])?"
}

proptest! {
    #[test]
    fn any_text_is_parsed_or_refused(text in ".{0,40}") {
        let _ = LabelSelector::parse(&text);
        let _ = FieldSelector::parse(&text);
    }

    #[test]
    fn text_form_is_stable(key in key(), values in prop::collection::vec("[a-z0-9]{1,4}", 1..4), not in any::<bool>()) {
        let text = format!("{key} {} ({})", if not { "notin" } else { "in" }, values.join(","));
        let selector = LabelSelector::parse(&text).unwrap();
        prop_assert_eq!(&LabelSelector::parse(&selector.to_string()).unwrap(), &selector);
        let has = labels(&[(&key, &values[0])]);
        prop_assert_eq!(selector.matches(&has), !not);
        prop_assert_eq!(selector.matches(&labels(&[])), not);
    }

    #[test]
    fn field_values_survive_escaping(value in r"[a-z,=\\]{0,8}") {
        let escaped = value.replace('\\', r"\\").replace(',', r"\,").replace('=', r"\=");
        let selector = FieldSelector::parse(&format!("a={escaped}")).unwrap();
        prop_assert_eq!(selector.requires_exactly("a"), Some(value.as_str()));
        prop_assert_eq!(selector.to_string(), format!("a={escaped}"));
    }
}

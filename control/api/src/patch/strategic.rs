//! Strategic merge patch: a merge patch whose lists are merged by key, with directives.
//!
//! | directive | where | meaning |
//! | --- | --- | --- |
//! | `$patch: replace` | in a map, or an item of a list | the patch stands for the whole value |
//! | `$patch: delete` | in a map, or an item of a list | the value, or the item of that key, goes |
//! | `$retainKeys: [field]` | in a map | fields that aren't listed go |
//! | `$deleteFromPrimitiveList/field: [value]` | beside a list of scalars | these values go |
//! | `$setElementOrder/field: [item]` | beside a list | listed items take this order |
//!
//! Items that only the server has keep their place relative to what was before them, as far as that is possible.
use std::collections::BTreeMap;

use serde_json::{Map, Value};

use super::{go_text, rejected};
use crate::{
    schema::{DefinitionId, Schema, Shape, Type},
    status::Status,
};

const PATCH: &str = "$patch";
const RETAIN_KEYS: &str = "$retainKeys";
const DELETE_FROM_LIST: &str = "$deleteFromPrimitiveList/";
const ELEMENT_ORDER: &str = "$setElementOrder/";

/// Why a patch doesn't apply.
#[derive(Debug, thiserror::Error)]
enum StrategicError {
    #[error("unknown patch type found: {0}")]
    Directive(String),
    #[error("invalid patch format of primitive list")]
    PrimitiveList,
    #[error("invalid patch format of setElementOrder list")]
    ElementOrder,
    #[error("invalid patch format of retainKeys")]
    RetainKeys,
    #[error("list of lists is not supported")]
    ListOfLists,
    #[error("the order in patch list doesn't match the {ELEMENT_ORDER} list of {0:?}")]
    OrderDiffers(String),
    #[error("map: {item} does not contain declared merge key: {key}")]
    NoMergeKey { item: String, key: String },
    #[error("merging lists cannot yet be specified in the patch")]
    MergeDirective,
    #[error("delete list of {0:?} with items that are no scalars")]
    MixedList(String),
}

impl From<StrategicError> for Status {
    fn from(error: StrategicError) -> Self {
        match &error {
            StrategicError::PrimitiveList
            | StrategicError::ElementOrder
            | StrategicError::RetainKeys
            | StrategicError::OrderDiffers(_)
            | StrategicError::MixedList(_) => Self::bad_request(error.to_string()),
            StrategicError::ListOfLists => rejected(),
            // Upstream has no code of its own for these either.
            StrategicError::Directive(_)
            | StrategicError::NoMergeKey { .. }
            | StrategicError::MergeDirective => Self::failure(500, "", error.to_string()),
        }
    }
}

/// Applies a patch to an object of the definition.
pub(super) fn apply(
    schema: &Schema,
    definition: DefinitionId,
    original: Map<String, Value>,
    patch: Map<String, Value>,
) -> Result<Map<String, Value>, Status> {
    Ok(Merge { schema }.map(original, patch, Some(&Type::Ref(definition)))?)
}

/// How a field's values merge.
#[derive(Clone, Copy, Default)]
struct Strategy<'s> {
    /// Type of the value; none if the schema doesn't know it.
    ty: Option<&'s Type>,
    /// Lists merge; else they replace.
    merge: bool,
    /// The key that identifies an item of a list of objects.
    key: Option<&'s str>,
}

impl<'s> Strategy<'s> {
    fn item(self) -> Option<&'s Type> {
        match self.ty {
            Some(Type::List(item)) => Some(item),
            _ => None,
        }
    }
}

struct Merge<'s> {
    schema: &'s Schema,
}

type Object = Map<String, Value>;
type Result<T, E = StrategicError> = std::result::Result<T, E>;

impl<'s> Merge<'s> {
    fn strategy<'t>(&self, ty: Option<&'t Type>, field: &str) -> Strategy<'t>
    where
        's: 't,
    {
        match ty {
            Some(Type::Map(value)) => Strategy { ty: Some(value), ..Strategy::default() },
            Some(Type::Ref(id)) if self.schema.get(*id).shape == Shape::Object => {
                let Some(field) = self.schema.get(*id).field(field) else { return Strategy::default() };
                Strategy { ty: Some(&field.ty), merge: field.patch_merge, key: field.merge_key.as_deref() }
            }
            _ => Strategy::default(),
        }
    }

    fn map(&self, mut original: Object, mut patch: Object, ty: Option<&Type>) -> Result<Object> {
        match patch.remove(PATCH) {
            None => {}
            Some(directive) if directive == "replace" => return Ok(patch),
            Some(directive) if directive == "delete" => return Ok(Object::new()),
            Some(other) => return Err(StrategicError::Directive(go_text(&other))),
        }
        if let Some(keys) = patch.remove(RETAIN_KEYS) {
            retain_keys(&mut original, &patch, &keys)?;
        }
        self.ordered_lists(&mut original, &mut patch, ty)?;
        for (key, value) in patch {
            if let Some(field) = key.strip_prefix(DELETE_FROM_LIST) {
                delete_scalars(&mut original, field, value)?;
                continue;
            }
            let merged = match (original.remove(&key), value) {
                (_, Value::Null) => continue,
                (None, value) => fresh(value),
                (Some(Value::Object(old)), Value::Object(new)) => {
                    Some(Value::Object(self.map(old, new, self.strategy(ty, &key).ty)?))
                }
                (Some(Value::Array(old)), Value::Array(new)) => {
                    Some(Value::Array(self.list(old, new, self.strategy(ty, &key))?))
                }
                // A value of another type takes the old one's place.
                (Some(_), value) => fresh(value),
            };
            if let Some(merged) = merged {
                original.insert(key, merged);
            }
        }
        Ok(original)
    }

    /// Merges the lists whose order the patch says, and takes them out of the patch.
    fn ordered_lists(&self, original: &mut Object, patch: &mut Object, ty: Option<&Type>) -> Result<()> {
        let orders: Vec<String> =
            patch.keys().filter(|key| key.starts_with(ELEMENT_ORDER)).cloned().collect();
        for order_key in orders {
            let Some(Value::Array(order)) = patch.remove(&order_key) else {
                return Err(StrategicError::ElementOrder);
            };
            let field = &order_key[ELEMENT_ORDER.len()..];
            let strategy = self.strategy(ty, field);
            let new = match patch.get(field) {
                Some(Value::Array(_)) => patch.remove(field).and_then(into_array),
                Some(Value::Null) => continue,
                Some(_) => return Err(StrategicError::ElementOrder),
                None => None,
            };
            if let Some(new) = &new {
                check_order(new, &order, strategy.key, field)?;
            }
            let old = match original.get(field) {
                Some(Value::Array(_)) => original.remove(field).and_then(into_array),
                _ => None,
            };
            let before = identities(old.as_deref().unwrap_or_default(), strategy.key);
            let merged = match (old, new) {
                (None, None) => continue,
                (Some(old), None) => old,
                (None, Some(new)) => new.into_iter().filter_map(fresh).collect(),
                (Some(old), Some(new)) => self.list(old, new, strategy)?,
            };
            let listed = identities(&order, strategy.key);
            original.insert(field.to_owned(), Value::Array(arrange(merged, &listed, &before, strategy.key)));
        }
        Ok(())
    }

    fn list(&self, original: Vec<Value>, patch: Vec<Value>, strategy: Strategy<'_>) -> Result<Vec<Value>> {
        if !strategy.merge {
            return Ok(patch.into_iter().filter_map(fresh).collect());
        }
        let mut all = original.iter().chain(&patch);
        if all.clone().any(Value::is_array) {
            return Err(StrategicError::ListOfLists);
        }
        let before = identities(&original, strategy.key);
        if !all.any(Value::is_object) {
            let listed = identities(&patch, None);
            let mut merged: Vec<Value> = Vec::with_capacity(original.len() + patch.len());
            for value in original.into_iter().chain(patch) {
                if !merged.contains(&value) {
                    merged.push(value);
                }
            }
            return Ok(arrange(merged, &listed, &before, None));
        }
        let Some(key) = strategy.key else {
            return Err(StrategicError::NoMergeKey { item: "list".to_owned(), key: String::new() });
        };
        let (mut merged, patch) = special_items(original, patch, key)?;
        let listed = identities(&patch, Some(key));
        for item in patch {
            let Value::Object(new) = item else { return Err(StrategicError::PrimitiveList) };
            let identity = merge_key(&new, key)?;
            match merged.iter_mut().find(|old| old.get(key) == Some(&identity)) {
                Some(old) => {
                    let Value::Object(old_fields) = old.take() else { continue };
                    *old = Value::Object(self.map(old_fields, new, strategy.item())?);
                }
                None => merged.extend(fresh(Value::Object(new))),
            }
        }
        Ok(arrange(merged, &listed, &before, Some(key)))
    }
}

fn into_array(value: Value) -> Option<Vec<Value>> {
    if let Value::Array(items) = value { Some(items) } else { None }
}

fn merge_key(item: &Object, key: &str) -> Result<Value> {
    let missing =
        || StrategicError::NoMergeKey { item: go_text(&Value::Object(item.clone())), key: key.to_owned() };
    item.get(key).cloned().ok_or_else(missing)
}

/// Carries out the directives among a list's items. Returns the list and what is left to merge into it.
fn special_items(mut original: Vec<Value>, patch: Vec<Value>, key: &str) -> Result<(Vec<Value>, Vec<Value>)> {
    let mut ordinary = Vec::with_capacity(patch.len());
    let mut replace = false;
    for item in patch {
        match item.get(PATCH) {
            None => ordinary.push(item),
            Some(directive) if directive == "delete" => {
                let Value::Object(fields) = &item else { continue };
                let identity = merge_key(fields, key)?;
                original.retain(|old| old.get(key) != Some(&identity));
            }
            Some(directive) if directive == "replace" => replace = true,
            Some(directive) if directive == "merge" => return Err(StrategicError::MergeDirective),
            Some(other) => return Err(StrategicError::Directive(go_text(other))),
        }
    }
    Ok(if replace { (ordinary, Vec::new()) } else { (original, ordinary) })
}

/// A value that is new to the object: without nulls and directives. Nothing if a directive deletes it.
fn fresh(value: Value) -> Option<Value> {
    match value {
        Value::Null => None,
        Value::Object(mut fields) => {
            if fields.remove(PATCH).is_some_and(|directive| directive == "delete") {
                return None;
            }
            let kept = fields.into_iter().filter(|(key, _)| {
                key != RETAIN_KEYS && !key.starts_with(DELETE_FROM_LIST) && !key.starts_with(ELEMENT_ORDER)
            });
            Some(Value::Object(kept.filter_map(|(key, value)| Some((key, fresh(value)?))).collect()))
        }
        Value::Array(items) => {
            let is_marker = |item: &Value| item.get(PATCH).is_some_and(|directive| directive == "replace");
            Some(Value::Array(items.into_iter().filter(|item| !is_marker(item)).filter_map(fresh).collect()))
        }
        scalar @ (Value::Bool(_) | Value::Number(_) | Value::String(_)) => Some(scalar),
    }
}

fn retain_keys(original: &mut Object, patch: &Object, keys: &Value) -> Result<()> {
    let keys = keys.as_array().ok_or(StrategicError::RetainKeys)?;
    let listed = |key: &str| keys.iter().any(|listed| listed == key);
    for (key, value) in patch {
        let directive = key.starts_with(DELETE_FROM_LIST) || key.starts_with(ELEMENT_ORDER);
        if !value.is_null() && !directive && !listed(key) {
            return Err(StrategicError::RetainKeys);
        }
    }
    original.retain(|key, _| listed(key));
    Ok(())
}

fn delete_scalars(original: &mut Object, field: &str, values: Value) -> Result<()> {
    let Value::Array(values) = values else { return Err(StrategicError::PrimitiveList) };
    let Some(Value::Array(list)) = original.get_mut(field) else { return Ok(()) };
    if list.iter().any(Value::is_object) {
        return Err(StrategicError::MixedList(field.to_owned()));
    }
    list.retain(|item| !values.contains(item));
    Ok(())
}

/// What identifies an item: its key's value, or itself.
fn identity<'v>(item: &'v Value, key: Option<&str>) -> Option<&'v Value> {
    match key {
        Some(key) => item.get(key),
        None => Some(item),
    }
}

/// Items' identities, as text that can be looked up, with their first places.
type Places = BTreeMap<String, usize>;

fn identities(items: &[Value], key: Option<&str>) -> Places {
    let mut places = Places::new();
    for (at, item) in items.iter().enumerate() {
        if let Some(identity) = identity(item, key) {
            places.entry(identity.to_string()).or_insert(at);
        }
    }
    places
}

fn place(item: &Value, key: Option<&str>, places: &Places) -> Option<usize> {
    places.get(&identity(item, key)?.to_string()).copied()
}

/// Items of the patch must come in the order that the patch says.
fn check_order(patch: &[Value], order: &[Value], key: Option<&str>, field: &str) -> Result<()> {
    let differs = || StrategicError::OrderDiffers(field.to_owned());
    let order = identities(order, key);
    let mut last = None;
    for item in patch.iter().filter(|item| item.get(PATCH).is_none()) {
        let at = place(item, key, &order).ok_or_else(differs)?;
        if last.is_some_and(|last| at < last) {
            return Err(differs());
        }
        last = Some(at);
    }
    Ok(())
}

/// Puts items that the patch lists in its order, and the others among them where they were before.
fn arrange(items: Vec<Value>, listed: &Places, before: &Places, key: Option<&str>) -> Vec<Value> {
    let (mut from_patch, mut others): (Vec<Value>, Vec<Value>) =
        items.into_iter().partition(|item| place(item, key, listed).is_some());
    from_patch.sort_by_key(|item| place(item, key, listed));
    others.sort_by_key(|item| place(item, key, before));
    let mut arranged = Vec::with_capacity(from_patch.len() + others.len());
    let mut others = others.into_iter().peekable();
    for item in from_patch {
        let place_before = place(&item, key, before);
        while let Some(other) = others.next_if(|other| {
            place_before.zip(place(other, key, before)).is_some_and(|(item, other)| other < item)
        }) {
            arranged.push(other);
        }
        arranged.push(item);
    }
    arranged.extend(others);
    arranged
}

//! What the fuzzer feeds: what an API server answers.

use bytes::Bytes;

use super::lines::{self, Line};
use super::page;

/// A page of a list, and an event of a watch. How many objects they have.
pub fn answer(bytes: &[u8]) -> usize {
    let text = Bytes::copy_from_slice(bytes);
    let mut objects = 0;
    if let Ok(page) = page::read(&text) {
        assert!(page.next.is_some() != page.last.is_some(), "it goes on, or it is the last");
        objects += page.objects.inspect(|object| drop(lines::version(object))).count();
    }
    match Line::read(&text) {
        Ok(Line::Applied(object) | Line::Deleted(object) | Line::Bookmark(object)) => {
            drop(lines::version(&object));
            objects + 1
        }
        Ok(Line::Failed(_)) | Err(_) => objects,
    }
}

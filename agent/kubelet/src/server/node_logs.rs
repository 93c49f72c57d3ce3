//! `GET /logs/…`: the node's own log files, below `/var/log` and never outside it.

use std::path::{Path, PathBuf};

use axum::body::Body;
use axum::response::{IntoResponse, Response};
use http::StatusCode;
use rustix::fs::{Mode, OFlags, ResolveFlags};
use tokio_util::io::ReaderStream;

use crate::shared::Shared;

const ROOT: &str = "/var/log";

/// Serves a file, or the names in a folder.
pub(super) async fn serve(_shared: &Shared, path: &[&str]) -> Response {
    let Some(path) = relative(path) else {
        return (StatusCode::BAD_REQUEST, "invalid path\n").into_response();
    };
    let opened = tokio::task::spawn_blocking(move || open(Path::new(ROOT), &path)).await;
    match opened {
        Ok(Ok(Entry::File(file))) => {
            let stream = ReaderStream::new(tokio::fs::File::from_std(file));
            ([(http::header::CONTENT_TYPE, "text/plain")], Body::from_stream(stream)).into_response()
        }
        Ok(Ok(Entry::Folder(names))) => names.join("\n").into_response(),
        Ok(Err(_)) | Err(_) => (StatusCode::NOT_FOUND, "404 page not found\n").into_response(),
    }
}

/// The decoded path, if every part of it is a plain name.
fn relative(parts: &[&str]) -> Option<PathBuf> {
    let mut path = PathBuf::new();
    for part in parts.iter().filter(|p| !p.is_empty()) {
        // Decoded once, here; what still holds a separator or climbs is refused.
        let decoded = percent_decode(part)?;
        if decoded == "." || decoded == ".." || decoded.contains(['/', '\\', '\0']) {
            return None;
        }
        path.push(decoded);
    }
    Some(path)
}

fn percent_decode(text: &str) -> Option<String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&byte, tail)) = rest.split_first() {
        if byte == b'%' {
            let code = std::str::from_utf8(tail.get(..2)?).ok()?;
            bytes.push(u8::from_str_radix(code, 16).ok()?);
            rest = &tail[2..];
        } else {
            bytes.push(byte);
            rest = tail;
        }
    }
    String::from_utf8(bytes).ok()
}

enum Entry {
    File(std::fs::File),
    Folder(Vec<String>),
}

/// Opens below `root`; the kernel refuses links that lead out of it.
fn open(root: &Path, path: &Path) -> std::io::Result<Entry> {
    let root_fd = rustix::fs::open(root, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
    let path = if path.as_os_str().is_empty() { Path::new(".") } else { path };
    let stay = ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS;
    // Non-blocking: a FIFO in the folder must not hold a thread.
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK;
    let file = std::fs::File::from(rustix::fs::openat2(&root_fd, path, flags, Mode::empty(), stay)?);
    let meta = file.metadata()?;
    if meta.is_dir() {
        let mut names = Vec::new();
        for entry in rustix::fs::Dir::read_from(&file)? {
            let name = entry?.file_name().to_string_lossy().into_owned();
            if name != "." && name != ".." {
                names.push(name);
            }
        }
        names.sort();
        return Ok(Entry::Folder(names));
    }
    if meta.is_file() { Ok(Entry::File(file)) } else { Err(std::io::Error::other("no regular file")) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_that_climb_are_refused() {
        for bad in
            [&["..", "x"][..], &["a", "..", "..", "x"], &["%2e%2e", "x"], &["..%2fx"], &["a%00"], &["%zz"]]
        {
            assert_eq!(relative(bad), None, "{bad:?}");
        }
        assert_eq!(relative(&["pods", "a%20b"]), Some(PathBuf::from("pods/a b")));
    }

    #[test]
    fn links_out_of_the_folder_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("a.log"), "x").unwrap();
        std::os::unix::fs::symlink("/etc/passwd", dir.path().join("out")).unwrap();
        assert!(matches!(open(dir.path(), Path::new("a.log")), Ok(Entry::File(_))));
        assert!(open(dir.path(), Path::new("out")).is_err());
        assert!(
            matches!(open(dir.path(), Path::new("")), Ok(Entry::Folder(names)) if names == ["a.log", "out"])
        );
    }
}

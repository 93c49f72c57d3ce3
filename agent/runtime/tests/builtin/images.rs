//! The image store: formats, digests, whiteouts, escapes, references, removal.

use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::Path;

use serde_json::json;
use tar::EntryType;
use weft_agent_runtime::Runtime;
use weft_agent_runtime::images::{ImageError, ImageStore};
use weft_tests_harness::require;

use crate::image::{self, Compression, Image, Layer};
use crate::node::{Node, script};

fn simple(name: &str) -> Image {
    let layers = vec![
        Layer::new().folder("d/", 0o750).file("d/f", 0o640, b"content").build(),
        Layer::new().file("g", 0o644, b"more").build(),
    ];
    Image::new(name, json!({"User": "www"}), layers)
}

fn layer_folder(store: &Path, image: &Image, index: usize) -> std::path::PathBuf {
    store.join("layers").join(&image::digest(&image.layers[index])[7..])
}

#[test]
fn every_format_and_compression_gives_the_same_image() {
    if !require("every_format_and_compression_gives_the_same_image", &["root"]) {
        return;
    }
    for compression in [Compression::None, Compression::Gzip, Compression::Zstd] {
        let image = Image { compression, ..simple("app:1") };
        let folder = tempfile::tempdir().unwrap();
        let (oci_tar, docker_tar, layout) =
            (folder.path().join("o.tar"), folder.path().join("d.tar"), folder.path().join("layout"));
        image::write_tar(&oci_tar, &image.oci());
        image::write_tar(&docker_tar, &image.docker());
        image::write_folder(&layout, &image.oci());
        let whole = folder.path().join("whole.tar.gz");
        fs::write(&whole, image::compress(&fs::read(&docker_tar).unwrap(), Compression::Gzip)).unwrap();
        for (number, archive) in [oci_tar, docker_tar, layout, whole].iter().enumerate() {
            let path = folder.path().join(format!("store{number}"));
            let store = ImageStore::open(&path).unwrap();
            let found = store.import(archive).unwrap();
            assert_eq!(found.len(), 1);
            assert_eq!(found[0].tags, ["docker.io/library/app:1"]);
            assert_eq!((found[0].size_bytes, found[0].user.as_str()), (11, "www"));
            assert_eq!(store.find("app:1").unwrap().as_ref(), Some(&found[0]));
            assert_eq!(store.find(&found[0].id).unwrap().as_ref(), Some(&found[0]));
            let file = layer_folder(&path, &image, 0).join("d/f");
            assert_eq!(fs::read_to_string(&file).unwrap(), "content");
            assert_eq!(fs::metadata(&file).unwrap().permissions().mode() & 0o7777, 0o640);
            assert_eq!(fs::metadata(file.parent().unwrap()).unwrap().mtime(), 1_700_000_000);
            assert_eq!(fs::read_dir(path.join("scratch")).unwrap().count(), 0);
        }
    }
}

#[test]
fn layers_become_what_overlayfs_understands() {
    if !require("layers_become_what_overlayfs_understands", &["root"]) {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let layer = Layer::new()
        .folder("d/", 0o755)
        .file("d/.wh.gone", 0o644, b"")
        .folder("o/", 0o755)
        .file("o/.wh..wh..opq", 0o644, b"")
        .file("a", 0o644, b"a")
        .link(EntryType::Link, "b", "a")
        .link(EntryType::Symlink, "abs", "/etc")
        .file("abs/inside", 0o644, b"i")
        .owned("suid", 12, 34)
        .xattr("cap", "user.note", b"value")
        .xattr("spoof", "trusted.overlay.redirect", b"/x")
        .file("twice", 0o644, b"1")
        .link(EntryType::Symlink, "twice", "a")
        .build();
    let image = Image::new("w", json!({}), vec![layer]);
    let store = ImageStore::open(folder.path().join("s")).unwrap();
    store.import(&image.write(folder.path())).unwrap();
    let root = layer_folder(&folder.path().join("s"), &image, 0);
    let gone = fs::symlink_metadata(root.join("d/gone")).unwrap();
    assert!(gone.file_type().is_char_device() && gone.rdev() == 0 && !root.join("d/.wh.gone").exists());
    let mut value = [0; 8];
    assert_eq!(rustix::fs::getxattr(root.join("o"), "trusted.overlay.opaque", &mut value).unwrap(), 1);
    assert_eq!(fs::metadata(root.join("a")).unwrap().ino(), fs::metadata(root.join("b")).unwrap().ino());
    assert_eq!(fs::read_to_string(root.join("etc/inside")).unwrap(), "i");
    let suid = fs::metadata(root.join("suid")).unwrap();
    assert_eq!((suid.uid(), suid.gid(), suid.mode() & 0o7777), (12, 34, 0o4755));
    assert_eq!(rustix::fs::getxattr(root.join("cap"), "user.note", &mut value).unwrap(), 5);
    assert!(rustix::fs::getxattr(root.join("spoof"), "trusted.overlay.redirect", &mut value).is_err());
    assert_eq!(fs::read_link(root.join("twice")).unwrap(), Path::new("a"));
}

#[test]
fn layers_that_climb_out_are_refused() {
    if !require("layers_that_climb_out_are_refused", &["root"]) {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let outside = folder.path().join("outside");
    fs::create_dir(&outside).unwrap();
    let there = outside.to_string_lossy().into_owned();
    for (number, layer) in [
        Layer::new().raw("../../../../outside/x", b"x").build(),
        Layer::new().raw("a/../../x", b"x").build(),
        Layer::new().link(EntryType::Link, "h", "../../../../../etc/passwd").build(),
        Layer::new().file(".wh...", 0o644, b"").build(),
    ]
    .into_iter()
    .enumerate()
    {
        let store = ImageStore::open(folder.path().join(format!("s{number}"))).unwrap();
        let image = Image::new(&format!("bad{number}"), json!({}), vec![layer]);
        let error = store.import(&image.write(folder.path())).unwrap_err();
        assert!(matches!(error, ImageError::Layer { .. }), "{number}: {error}");
        assert!(store.list().unwrap().is_empty());
        assert_eq!(fs::read_dir(folder.path().join(format!("s{number}/layers"))).unwrap().count(), 0);
    }
    // A link that leads out is followed as a container would follow it.
    let layer = Layer::new().link(EntryType::Symlink, "l", &there).file("l/x", 0o644, b"x").build();
    let image = Image::new("link", json!({}), vec![layer]);
    let store = ImageStore::open(folder.path().join("link")).unwrap();
    store.import(&image.write(folder.path())).unwrap();
    assert_eq!(fs::read_dir(&outside).unwrap().count(), 0);
}

#[test]
fn wrong_digests_and_broken_archives_are_refused() {
    if !require("wrong_digests_and_broken_archives_are_refused", &["root"]) {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let store = ImageStore::open(folder.path().join("s")).unwrap();
    let image = simple("app:1");
    let path = folder.path().join("x.tar");
    for name in image.oci().keys().filter(|name| name.starts_with("blobs/")) {
        let mut files = image.oci();
        let blob = files.get_mut(name).unwrap();
        let middle = blob.len() / 3;
        blob[middle] ^= 1;
        image::write_tar(&path, &files);
        assert!(store.import(&path).is_err(), "a changed {name} is imported");
    }
    let mut files = image.docker();
    files.insert("1/layer.tar".to_owned(), image.layers[0].clone());
    image::write_tar(&path, &files);
    assert!(matches!(store.import(&path), Err(ImageError::Digest { .. })));
    for (name, text) in [
        ("index.json", "{"),
        ("index.json", "{\"manifests\":[]}"),
        ("manifest.json", "[{\"Config\":\"../x\",\"Layers\":[]}]"),
        ("nothing", "x"),
    ] {
        image::write_tar(&path, &[(name.to_owned(), text.as_bytes().to_vec())].into());
        assert!(store.import(&path).is_err(), "{text}");
    }
    fs::write(&path, "no archive at all").unwrap();
    assert!(store.import(&path).is_err());
    assert!(store.list().unwrap().is_empty());
    assert_eq!(fs::read_dir(folder.path().join("s/scratch")).unwrap().count(), 0);
}

#[test]
fn tags_move_and_removal_keeps_shared_layers() {
    if !require("tags_move_and_removal_keeps_shared_layers", &["root"]) {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("s");
    let (store, other) = (ImageStore::open(&path).unwrap(), ImageStore::open(&path).unwrap());
    let first = simple("app:1");
    let mut second = simple("app:2");
    second.layers[1] = Layer::new().file("g", 0o644, b"other").build();
    let first_id = store.import(&first.write(folder.path())).unwrap()[0].id.clone();
    store.import(&second.write(folder.path())).unwrap();
    // What one process changes, the other sees.
    assert_eq!(other.list().unwrap().len(), 2);
    let moved =
        Image { name: "app:1".to_owned(), ..Image::new("", second.config.clone(), second.layers.clone()) };
    store.import(&moved.write(folder.path())).unwrap();
    assert_eq!(other.find(&first_id).unwrap().unwrap().tags, Vec::<String>::new());
    assert_eq!(other.find("app:1").unwrap().unwrap().tags.len(), 2);
    other.remove("app:1").unwrap();
    assert!(store.find("app:1").unwrap().is_none() && store.find("app:2").unwrap().is_some());
    store.remove(&first_id).unwrap();
    assert!(!layer_folder(&path, &first, 1).exists() && layer_folder(&path, &first, 0).exists());
    store.remove("app:2").unwrap();
    assert!(matches!(store.remove("app:2"), Err(ImageError::NotFound(_))));
    assert_eq!(
        fs::read_dir(path.join("layers")).unwrap().count()
            + fs::read_dir(path.join("scratch")).unwrap().count(),
        0
    );
    assert!(matches!(store.find("UPPER/case"), Err(ImageError::Reference(_))));
}

#[test]
fn imports_at_the_same_time_do_not_hurt_each_other() {
    if !require("imports_at_the_same_time_do_not_hurt_each_other", &["root"]) {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("s");
    std::thread::scope(|scope| {
        for number in 0..6 {
            let (path, image) = (&path, simple(&format!("app:{}", number % 3)));
            let archive = folder.path().join(format!("{number}.tar"));
            image::write_tar(&archive, &image.docker());
            scope.spawn(move || {
                let store = ImageStore::open(path).unwrap();
                for _ in 0..5 {
                    store.import(&archive).unwrap();
                    match store.remove(&format!("app:{}", number % 3)) {
                        Ok(()) | Err(ImageError::NotFound(_)) => {}
                        Err(error) => panic!("{error}"),
                    }
                }
                store.import(&archive).unwrap();
            });
        }
    });
    let store = ImageStore::open(&path).unwrap();
    assert_eq!(store.list().unwrap().len(), 1);
    assert_eq!(store.list().unwrap()[0].tags.len(), 3);
    assert_eq!(fs::read_dir(path.join("layers")).unwrap().count(), 2);
}

#[tokio::test]
async fn layers_stack_and_a_used_image_stays() {
    if !require("layers_stack_and_a_used_image_stays", &["root"]) {
        return;
    }
    let node = Node::new().await;
    let mut image = image::busybox(
        "stack:1",
        json!({"Entrypoint": ["sh", "-c"], "Cmd": ["ls /o /d; cat /f; id -u"], "User": "www:logs"}),
    );
    image.layers.push(
        Layer::new()
            .folder("o/", 0o755)
            .file("o/old", 0o644, b"")
            .folder("d/", 0o755)
            .file("d/gone", 0o644, b"")
            .file("d/kept", 0o644, b"")
            .file("f", 0o644, b"one\n")
            .build(),
    );
    image.layers.push(
        Layer::new()
            .folder("o/", 0o755)
            .file("o/.wh..wh..opq", 0o644, b"")
            .file("o/new", 0o644, b"")
            .file("d/.wh.gone", 0o644, b"")
            .file("f", 0o644, b"two\n")
            .build(),
    );
    node.runtime().images().import(&image.write(node.folder.path())).unwrap();
    let mut spec = script("c", "");
    (spec.image, spec.command) = ("stack:1".to_owned(), Vec::new());
    let (exit, output) = node.run(spec).await;
    assert_eq!((exit.code, output.as_str()), (0, "/d:\nkept\n\n/o:\nnew\ntwo\n33\n"));
    let id = node.runtime().list_containers().await.unwrap()[0].id.clone();
    assert!(
        matches!(node.runtime().images().remove("stack:1"), Err(ImageError::InUse { container, .. }) if container == id)
    );
    node.runtime().remove_container(&id).await.unwrap();
    node.runtime().images().remove("stack:1").unwrap();
    node.finish().await;
}

#[tokio::test]
async fn an_image_may_have_many_layers() {
    if !require("an_image_may_have_many_layers", &["root", "layers"]) {
        return;
    }
    let node = Node::new().await;
    let mut image = image::busybox("deep:1", json!({}));
    for number in 0..100 {
        let layer = Layer::new().file("same", 0o644, format!("{number}\n").as_bytes());
        image.layers.push(layer.file(&format!("own{number}"), 0o644, b"").build());
    }
    node.runtime().images().import(&image.write(node.folder.path())).unwrap();
    let mut spec = script("c", "ls / | grep -c own; cat /same");
    spec.image = "deep:1".to_owned();
    assert_eq!(node.run(spec).await.1, "100\n99\n");
    node.finish().await;
}

//! Applies the rules of `hospes-tidy` to every file of the repository.

use std::fs;
use std::path::{Path, PathBuf};

use hospes_tidy::{
    check_header, check_length, check_machine_paths, check_unfinished, concerns, parse_long_files,
};

fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

/// Relative paths of all files under `directory`, without build products and hidden directories.
fn walk(root: &Path, directory: &Path, found: &mut Vec<String>) {
    for entry in fs::read_dir(directory).expect("the repository is readable") {
        let path = entry.expect("the repository is readable").path();
        let name = path
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        if path.is_symlink() || name.starts_with('.') || name == "target" {
            continue;
        }
        if path.is_dir() {
            walk(root, &path, found);
        } else if let Ok(relative) = path.strip_prefix(root) {
            found.push(relative.to_string_lossy().into_owned());
        }
    }
}

#[test]
fn tidy_tree_has_no_findings() {
    let root = repository();
    let reasons = fs::read_to_string(root.join("crates/tidy/long-files.txt"))
        .map_err(|error| error.to_string())
        .and_then(|text| parse_long_files(&text))
        .expect("crates/tidy/long-files.txt is well formed");
    let mut paths = Vec::new();
    walk(&root, &root, &mut paths);
    assert!(paths.len() > 20, "only {} files found", paths.len());

    let mut findings = Vec::new();
    for path in paths.iter().filter(|path| concerns(path)) {
        let Ok(text) = fs::read_to_string(root.join(path)) else {
            findings.push(format!("{path}: not UTF-8"));
            continue;
        };
        findings.extend(check_length(path, &text, &reasons));
        findings.extend(check_unfinished(path, &text));
        findings.extend(check_machine_paths(path, &text));
        if path.ends_with("/src/lib.rs") || path.ends_with("/src/main.rs") {
            findings.extend(check_header(path, &text));
        }
    }
    for path in reasons.keys().filter(|path| !paths.contains(path)) {
        findings.push(format!("{path}: is in long-files.txt and does not exist"));
    }
    assert!(findings.is_empty(), "\n{}", findings.join("\n"));
}

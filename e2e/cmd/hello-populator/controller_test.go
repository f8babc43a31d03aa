package main

import (
	"encoding/json"
	"io"
	"maps"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

const (
	claimPath = "/api/v1/namespaces/user/persistentvolumeclaims/c"
	primePath = "/api/v1/namespaces/pop/persistentvolumeclaims/populate-u1"
	podPath   = "/api/v1/namespaces/pop/pods/populate-u1"
	pvPath    = "/api/v1/persistentvolumes/pv1"
	helloPath = "/apis/hello.example.com/v1alpha1/namespaces/user/hellos/h"
	classPath = "/apis/storage.k8s.io/v1/storageclasses/late"
)

// store is an API server that keeps objects by their paths.
type store map[string]map[string]any

func (s store) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	body, _ := io.ReadAll(r.Body)
	var sent map[string]any
	_ = json.Unmarshal(body, &sent) // none with GET
	object := s[r.URL.Path]
	switch {
	case r.Method == http.MethodGet && r.URL.Path == "/api/v1/persistentvolumeclaims":
		var items []any
		for path, o := range s {
			if strings.Contains(path, "/persistentvolumeclaims/") {
				items = append(items, o)
			}
		}
		object = map[string]any{"items": items}
	case r.Method == http.MethodPost:
		s[r.URL.Path+"/"+sent["metadata"].(map[string]any)["name"].(string)] = sent
		return
	case object == nil:
		http.Error(w, "no "+r.URL.Path, http.StatusNotFound)
		return
	case r.Method == http.MethodPatch:
		for part, change := range sent {
			if object[part] == nil {
				object[part] = map[string]any{}
			}
			maps.Copy(object[part].(map[string]any), change.(map[string]any))
		}
		return
	case r.Method == http.MethodDelete:
		delete(s, r.URL.Path)
		return
	}
	_ = json.NewEncoder(w).Encode(object)
}

func object(t *testing.T, text string) map[string]any {
	t.Helper()
	var o map[string]any
	require.NoError(t, json.Unmarshal([]byte(text), &o))
	return o
}

// TestPopulate goes through the life of a claim, one round a step.
func TestPopulate(t *testing.T) {
	t.Parallel()
	s := store{
		classPath: object(t, `{"volumeBindingMode": "WaitForFirstConsumer"}`),
		helloPath: object(t, `{"spec": {"fileName": "f", "fileContents": "text"}}`),
		claimPath: object(t, `{"metadata": {"name": "c", "namespace": "user", "uid": "u1", "resourceVersion": "5",
			"finalizers": ["kubernetes.io/pvc-protection"]}, "spec": {"storageClassName": "late", "accessModes": ["ReadWriteOnce"],
			"resources": {"requests": {"storage": "1Gi"}},
			"dataSourceRef": {"apiGroup": "hello.example.com", "kind": "Hello", "name": "h"}}}`),
		"/api/v1/namespaces/user/persistentvolumeclaims/other": object(t, `{"metadata": {"name": "other", "namespace": "user"}}`),
	}
	server := httptest.NewServer(s)
	defer server.Close()
	c := &controller{api: &client{base: server.URL}, namespace: "pop", image: "hello"}
	round := func() {
		t.Helper()
		require.NoError(t, c.round())
	}
	meta := func() map[string]any { return s[claimPath]["metadata"].(map[string]any) }
	spec := func(path string) map[string]any { return s[path]["spec"].(map[string]any) }

	before := len(s)
	round()
	require.Len(t, s, before, "no node is chosen yet")
	meta()["annotations"] = map[string]any{selectedNode: "n2"}
	round()
	assert.Equal(t, []any{"kubernetes.io/pvc-protection", finalizer}, meta()["finalizers"])
	round()
	require.Contains(t, s, primePath)
	assert.NotContains(t, spec(primePath), "dataSourceRef")
	assert.Equal(t, spec(claimPath)["resources"], spec(primePath)["resources"])
	assert.Equal(t, "n2", s[primePath]["metadata"].(map[string]any)["annotations"].(map[string]any)[selectedNode])
	round()
	require.Contains(t, s, podPath)
	assert.Equal(t, "n2", spec(podPath)["nodeName"])
	text, err := json.Marshal(s[podPath])
	require.NoError(t, err)
	assert.Contains(t, string(text), `"--file-name=/mnt/f","--file-contents=text"`)

	s[pvPath] = object(t, `{"metadata": {}, "spec": {"claimRef": {"namespace": "pop", "name": "populate-u1", "uid": "u2"}}}`)
	spec(primePath)["volumeName"] = "pv1"
	round()
	assert.Equal(t, "u2", spec(pvPath)["claimRef"].(map[string]any)["uid"], "the pod still writes")
	s[podPath]["status"] = map[string]any{"phase": phaseSucceeded}
	round()
	assert.Equal(t, map[string]any{"namespace": "user", "name": "c", "uid": "u1", "resourceVersion": "5"},
		spec(pvPath)["claimRef"])

	spec(claimPath)["volumeName"] = "pv1"
	s[primePath]["status"] = map[string]any{"phase": "Bound"}
	round()
	require.Contains(t, s, primePath, "its deletion would be that of the volume")
	s[primePath]["status"] = map[string]any{"phase": phaseLost}
	round()
	assert.NotContains(t, s, primePath)
	assert.NotContains(t, s, podPath)
	round()
	assert.Equal(t, []any{"kubernetes.io/pvc-protection"}, meta()["finalizers"])
	round()
	assert.NotContains(t, s, primePath)
}

func TestWriteFile(t *testing.T) {
	t.Parallel()
	file := filepath.Join(t.TempDir(), "f")
	require.NoError(t, populate(file, "text"))
	text, err := os.ReadFile(file)
	require.NoError(t, err)
	require.Equal(t, "text", string(text))
	require.ErrorContains(t, run("dance", "", "", nil), `"dance"`)
}
